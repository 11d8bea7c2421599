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
    "adapters": {
        "adapters",
        "Head",
        "linear_logprob",
        "validation",
    },  # public names of the package
    "ops": {"ops", *BACKENDS},
    "reference": {"reference", "types"},
    **{backend: {backend} for backend in BACKENDS},
}


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
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = imported_modules(path)
    inside = {name.split(".")[1] for name in names if name.startswith("cwdpo_kernels.")}
    assert inside <= ALLOWED[part], f"{path}: {inside - ALLOWED[part]}"
    assert not {name.split(".")[0] for name in names} & {
        "cwdpo_trainer",
        "trainer",
        "tests",
        "benchmarks",
        "transformers",
    }


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
