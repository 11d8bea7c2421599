import os
import runpy
import sys
from pathlib import Path

# Kernels are interpreted where there is no GPU. Triton reads this once, when it is first imported.
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it

import pytest
import torch

from cwdpo_kernels import ops


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture(params=["portable", "csrc", "triton"])
def backend(request):
    """Each op test runs once for every backend: Triton on a GPU where there is one, else on its interpreter."""
    interpreted = request.param == "triton" and not torch.cuda.is_available()
    if interpreted and request.node.get_closest_marker("slow_interpreted"):
        pytest.skip("too large for the interpreter")
    if request.param == "csrc" and ops.missing_backend("cpu"):
        pytest.skip(ops.missing_backend("cpu"))  # tests/test_library.py fails if there was a compiler
    device = "cuda" if request.param == "triton" and not interpreted else "cpu"
    with torch.device(device), ops.forced(device, request.param):
        yield request.param


@pytest.fixture(scope="session")
def load_example():
    """Run a file of docs/examples, as a script or for its functions, and return its names."""
    folder = Path(__file__).parents[1] / "docs" / "examples"

    def load(name: str, run_name: str = "example") -> dict:
        sys.path.insert(0, str(folder))  # as Python does for a script
        try:
            return runpy.run_path(str(folder / f"{name}.py"), run_name=run_name)
        finally:
            sys.path.remove(str(folder))

    return load
