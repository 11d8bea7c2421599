import os

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
