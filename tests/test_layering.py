"""The direction of imports: trainer -> functional -> ops -> backends; nothing imports upwards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cwdpo_kernels"
BACKENDS = {"portable", "triton"}
# What each part of the package may import from it. `reference` and `testing` are for tests and benchmarks only.
ALLOWED = {
    "__init__": {"functional", "losses", "ops", "types"},
    "losses": {"functional", "types", "validation"},
    "functional": {"ops", "types", "validation"},
    "types": {"validation"},
    "validation": set(),
    "testing": {"types"},
    "adapters": {"adapters", "validation"},  # and the public names of the package
    "ops": {"ops", *BACKENDS},
    "reference": {"reference", "types"},
    **{backend: {backend} for backend in BACKENDS},
}
# Packages of others: what subclasses one of their classes may import it. Signatures are copied, not imported.
PEERS = {"transformers", "accelerate", "peft", "datasets", "trl", "lightning", "liger_kernel", "verl"}
PEERS_OF = {"adapters/trl.py": {"trl", "transformers", "accelerate"}}


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_kernels(path):
    name = path.relative_to(PACKAGE).as_posix()
    part = name.split("/")[0].removesuffix(".py")
    modules = imported_modules(path)
    inside = {module.split(".")[1] for module in modules if module.startswith("cwdpo_kernels.")}
    allowed = ALLOWED[part] | (set(_public_names()) if part == "adapters" else set())
    assert inside <= allowed, f"{path}: {inside - allowed}"
    packages = {module.split(".")[0] for module in modules}
    assert not packages & {"cwdpo_trainer", "trainer", "tests", "benchmarks"}
    assert packages & PEERS == PEERS_OF.get(name, set())


@pytest.mark.parametrize("path", sorted((ROOT / "trainer").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_trainer_uses_the_public_names_only(path):
    public = {"cwdpo_kernels." + name for name in _public_names()}
    public |= {f"cwdpo_kernels.adapters.hugging_face.{name}" for name in ("HeadError", "attach_head", "check_head")}
    used = {name for name in imported_modules(path) if name.startswith("cwdpo_kernels.")}
    assert used <= public, f"{path}: {used - public}"


def _public_names() -> list[str]:
    import cwdpo_kernels

    return [*cwdpo_kernels.__all__, "__version__"]


def test_importing_needs_neither_triton_nor_transformers():
    """And no GPU: the kernels package alone, with both imports blocked."""
    code = "import sys; sys.modules.update(triton=None, transformers=None); import cwdpo_kernels"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
