"""The package as Hugging Face's `kernels` library loads it: from a folder, under its own name and op namespace."""

import json
import platform
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cwdpo_kernels as ck
from cwdpo_kernels.ops import library, schema
from cwdpo_kernels.testing import make_inputs

kernels = pytest.importorskip("kernels", reason="the `kernels` package is not installed")

ROOT = Path(__file__).parents[1]
# What kernel-builder writes into a build instead of cwdpo_kernels/_ops.py.
OPS = """import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str):
    return f"{namespace}::{{op_name}}"
"""


def lay_out(folder: Path, namespace: str) -> Path:
    """Write the folder of a kernel repository with one build of the package; return the build."""
    has_library = library.PATH.exists()
    framework = "torch-stable-abi211-cpu" if has_library else "torch-cpu"
    variant = folder / "build" / (f"{framework}-{platform.machine()}-linux" if has_library else framework)
    shutil.copytree(ROOT / "cwdpo_kernels", variant, ignore=shutil.ignore_patterns("__pycache__", "_ops.py"))
    (variant / "_ops.py").write_text(OPS.format(namespace=namespace))
    metadata = {
        "id": namespace, "name": "cwdpo-kernels", "version": 0, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": "cpu"},
    }  # fmt: skip
    algorithm = kernels._rust.DigestAlgorithm.SHA256
    metadata["digest"] = {"algorithm": "sha256", "files": kernels._rust.Digest.hash_variant(algorithm, variant).files}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return variant


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Two versions of the package in one process, beside the one that is imported."""
    loaded = []
    for namespace in ("_cwdpo_kernels_cpu_0a1b2c3", "_cwdpo_kernels_cpu_4d5e6f7"):
        folder = tmp_path_factory.mktemp("kernel")
        lay_out(folder, namespace)
        loaded.append(kernels.get_local_kernel(folder, backend="cpu"))
    return loaded


class Namespaces(TorchDispatchMode):
    """Records the namespaces of the ops that run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def test_each_version_runs_its_own_ops(versions):
    hidden, head, labels = make_inputs((4, 9), 37, 8)
    references = torch.zeros(2), torch.zeros(2)

    def step(package):
        options = {"beta": 0.1, "cooling": package.Cooling()}
        with Namespaces() as namespaces:
            out = package.linear_cwdpo_loss(hidden, package.Head(head.weight), labels, *references, **options)
            grads = torch.autograd.grad(out.loss, [hidden, head.weight])
        assert namespaces.seen - {"aten", "prim"} == {"cwdpo" if package is ck else package.__name__}
        return out.loss, *grads

    expected = step(ck)
    for package in versions:
        assert package.Head is not ck.Head
        assert package.backend("cpu") == ck.backend("cpu")
        assert package.default_workspace_bytes("cpu") == ck.default_workspace_bytes("cpu")
        assert all(torch.equal(actual, each) for actual, each in zip(step(package), expected, strict=True))


def test_namespaces_hold_the_same_ops(versions):
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}

    def ops(namespace):
        return {name.partition("::")[2] for name in names if name.startswith(f"{namespace}::")}

    assert ops("cwdpo") == set(schema.OPS)
    assert all(ops(package.__name__) == ops("cwdpo") for package in versions)


def test_the_library_s_own_checks_pass(tmp_path, versions):
    variant = lay_out(tmp_path, "_cwdpo_kernels_cpu_8a9b0c1")
    metadata = kernels.Metadata.read_from_file(variant / "metadata.json")
    assert metadata.name.python_name == "cwdpo_kernels"
    metadata.digest.validate(kernels._rust.Digest.hash_variant(metadata.digest.algorithm, variant))
    assert {package.__name__ for package in versions} <= {each.metadata.id for each in kernels.get_loaded_kernels()}


def test_build_toml_lists_every_source():
    build = tomllib.loads((ROOT / "build.toml").read_text())
    listed = [*build["torch"]["src"], *build["kernel"]["csrc"]["src"]]
    sources = [
        path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h")
    ]
    assert sorted(listed) == sorted(sources)
    assert (ROOT / "torch-ext" / "cwdpo_kernels" / "__init__.py").samefile(ROOT / "cwdpo_kernels" / "__init__.py")
