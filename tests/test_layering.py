"""The direction of imports, read from the source: each part imports only from parts below it.

    trainer -> {compat, integrations} -> functional -> ops -> {portable | triton | csrc}

`PARTS` is the order of the trainer's parts. `python tests/test_layering.py` prints an overview.
"""

import ast
import functools
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cwdpo_kernels"
TRAINER = ROOT / "trainer" / "cwdpo_trainer"
BACKENDS = {"portable", "triton"}
ADAPTERS = {"compat", "integrations"}
# What each part of cwdpo_kernels may import from it. Only tests and benchmarks import `reference` and `testing`.
ALLOWED = {
    "__init__": {"functional", "losses", "ops", "preference", "trees", "types"},
    "preference": {"preference", "losses", "functional", "_inputs", "_pairs", "types", "validation"},
    "losses": {"functional", "_inputs", "_ops", "_pairs", "_smoothing", "ops", "types", "validation"},
    "functional": {"_inputs", "_ops", "ops", "types", "validation"},
    "_inputs": {"_ops", "_vocab_parallel", "ops", "types", "validation"},
    "_vocab_parallel": {"_ops", "ops", "types", "validation"},
    "_pairs": {"_inputs", "types", "validation"},
    "_ops": set(),
    "_smoothing": {"types"},
    "types": {"validation"},
    "validation": set(),
    "testing": {"types"},
    # The package's public names, and helpers of its own functions.
    **{group: {group, "__init__", "_inputs", "_smoothing", "preference", "trees", "validation"} for group in ADAPTERS},
    "trees": {"ops", "trees", "validation"},
    "ops": {"ops", "_ops", "validation", *BACKENDS},
    "reference": {"reference", "types"},
    **{backend: {backend} for backend in BACKENDS},
}
# An adapter may import another project only to subclass its classes. Function signatures are copied.
PEERS = {"transformers", "accelerate", "peft", "datasets", "trl", "lightning", "liger_kernel", "verl"}
PEERS_OF = {
    "integrations/trl.py": {"trl", "transformers", "accelerate"},
    "integrations/trl_head.py": {"trl", "transformers"},
    "integrations/trl_sharing.py": {"accelerate"},
    "integrations/shared_prefix.py": {"transformers"},  # it registers an attention there
}
# The parts of the trainer (subpackages and top-level modules), lowest first. Each imports only from those before it.
PARTS = (
    "errors", "chat_templates", "files", "manifest", "reporter", "config", "run_folder", "pixels", "text_processor",
    "rounding", "data", "models", "negatives", "evaluation", "stages", "preflight", "run", "merge", "recipes", "cli",
)  # fmt: skip
LARGEST_PART = 10  # modules


def imported_modules(path: Path) -> set[str]:
    """The absolute names that a file imports; `package.module.name` for `from package.module import name`."""
    package = path.relative_to(ROOT if PACKAGE in path.parents else ROOT / "trainer").parts[:-1]
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            modules.update(f"{base}.{alias.name}" for alias in node.names)
    return modules


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_kernels(path):
    name = path.relative_to(PACKAGE).as_posix()
    part = name.split("/")[0].removesuffix(".py")
    modules = imported_modules(path)
    inside = {module.split(".")[1] for module in modules if module.startswith("cwdpo_kernels.")}
    inside = {module if (PACKAGE / module).is_dir() or (PACKAGE / f"{module}.py").exists() else "__init__"
              for module in inside}  # fmt: skip
    if part == "__init__":
        inside.discard("__init__")
    assert inside <= ALLOWED[part], f"{path}: {inside - ALLOWED[part]}"
    packages = {module.split(".")[0] for module in modules}
    assert not packages & {"cwdpo_trainer", "trainer", "tests", "benchmarks"}
    assert packages & PEERS == PEERS_OF.get(name, set())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_kernels_do_not_name_their_package(path):
    """The `kernels` library loads the package under another name, with another namespace of its ops."""
    assert path.name == "_ops.py" or not re.search(r"ops\.cwdpo\b|cwdpo::", path.read_text())
    names = [
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for alias in node.names
    ]
    assert not [name for name in names if name.split(".")[0] == "cwdpo_kernels"]


@pytest.mark.parametrize("path", sorted(TRAINER.rglob("*.py")), ids=lambda p: str(p.relative_to(TRAINER)))
def test_trainer_uses_the_public_names_only(path):
    import cwdpo_kernels
    from cwdpo_kernels.integrations import hugging_face, shared_images, shared_prefix

    public = {f"cwdpo_kernels.{name}" for name in [*cwdpo_kernels.__all__, "__version__"]}
    public |= {
        f"{module.__name__}.{name}"
        for module in (hugging_face, shared_images, shared_prefix)
        for name in module.__all__
    }
    used = {name for name in imported_modules(path) if name.startswith("cwdpo_kernels.")}
    assert used <= public, f"{path}: {used - public}"


@functools.cache
def trainer_modules() -> dict[str, set[str]]:
    """The trainer's modules, and which of them each one imports."""
    names = {}
    for path in TRAINER.rglob("*.py"):
        parts = path.relative_to(TRAINER).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for name, path in names.items():
        modules = {module.removeprefix("cwdpo_trainer.") for module in imported_modules(path)}
        found[name] = {each for each in (m if m in names else m.rpartition(".")[0] for m in modules) if each in names}
        found[name] -= {"", name}
    del found[""]
    return found


def part_of(module: str) -> str:
    return module.split(".")[0]


def levels(modules: dict[str, set[str]]) -> int:
    """The length of the longest import chain. Raises `graphlib.CycleError` if imports are circular."""
    level: dict[str, int] = {}
    for module in TopologicalSorter(modules).static_order():
        level[module] = 1 + max((level[below] for below in modules.get(module, ())), default=0)
    return max(level.values())


def test_no_circular_imports_in_the_trainer():
    modules = trainer_modules()
    assert levels(modules) <= 16
    groups: dict[str, set[str]] = {name: set() for name in PARTS}
    for module, below in modules.items():
        groups[part_of(module)] |= {part_of(each) for each in below} - {part_of(module)}
    assert levels(groups) <= len(PARTS)


@pytest.mark.parametrize("module", sorted(trainer_modules()))
def test_parts_import_only_from_those_below(module):
    index = PARTS.index(part_of(module))
    upward = {each for each in trainer_modules()[module] if PARTS.index(part_of(each)) > index}
    assert not upward


def test_parts_stay_small():
    sizes = part_sizes()
    assert max(sizes.values()) <= LARGEST_PART, sizes


def part_sizes() -> dict[str, int]:
    modules = [module for module in trainer_modules() if "." in module]
    return {name: sum(part_of(module) == name for module in modules) for name in PARTS}


def test_importing_needs_neither_triton_nor_transformers():
    """Import cwdpo_kernels with both packages blocked."""
    code = "import sys; sys.modules.update(triton=None, transformers=None); import cwdpo_kernels"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


if __name__ == "__main__":
    found = trainer_modules()
    print(f"{len(found)} modules, {sum(map(len, found.values()))} imports, {levels(found)} levels, 0 cycles")
    for name, size in part_sizes().items():
        below = {part_of(each) for module, each_of in found.items() if part_of(module) == name for each in each_of}
        print(f"{name:12} {size or 1:2} modules, imports: {', '.join(sorted(below - {name}, key=PARTS.index)) or '-'}")
