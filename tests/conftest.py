import contextlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Without a GPU, Triton's interpreter runs the kernels. Triton reads the variable once, when it is first imported.
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic
# Several pytest workers share the cores. Threads that wait would spin, and keep the other workers from running.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest
import torch

from cwdpo_kernels import ops

sys.path.insert(0, str(Path(__file__).parent))  # for modules of tests


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(params=["portable", "csrc", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per backend. Triton runs on the GPU if there is one, else in its interpreter."""
    interpreted = request.param == "triton" and not torch.cuda.is_available()
    if interpreted and request.node.get_closest_marker("slow_interpreted"):
        pytest.skip("too slow in the interpreter")
    if request.param == "csrc" and (reason := ops.missing_backend("cpu")):
        pytest.skip(reason)  # tests/test_library.py fails if a compiler is installed
    on_a_mock = interpreted and not request.node.get_closest_marker("plain_tensors")
    device = "cuda" if request.param == "triton" and (on_a_mock or not interpreted) else "cpu"
    with contextlib.ExitStack() as stack:
        if on_a_mock:
            import mock_gpu

            stack.enter_context(mock_gpu.running())
        stack.enter_context(torch.device(device))
        stack.enter_context(ops.forced(device, request.param))
        yield request.param


@pytest.fixture
def only_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter raises MemoryError if a kernel reads or writes outside the tensors of its launch."""
    if torch.cuda.is_available():
        return  # the interpreter does not run
    from triton.runtime import interpreter

    spans: list[tuple[int, int]] = []
    launch, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def watched_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [getattr(arg, "base", arg) for arg in (*args, *kwargs.values())]  # of a tensor descriptor
        spans[:] = [_span(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.numel()]
        return launch(self, *args, **kwargs)

    def check(pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data)[np.asarray(mask.data).astype(bool)]  # 0 and 1 may be integers
        inside = sum((addresses >= start) & (addresses < end) for start, end in spans)
        if addresses.size and not (inside > 0).all():
            raise MemoryError("a kernel touches memory outside its tensors")

    def watched_load(self: Any, pointers: Any, mask: Any, *args: Any, **options: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *args, **options)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **options: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched_launch)
    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)


@pytest.fixture
def allow_tf32() -> Iterator[Callable[[], None]]:
    """A function that allows float32 products in tf32 on a GPU until the test ends."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield lambda: setattr(matmul, "fp32_precision", "tf32")
    matmul.fp32_precision = before


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first entry to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@pytest.fixture(scope="session")
def load_example() -> Callable[..., dict[str, Any]]:
    """A function that runs a file of docs/examples and returns its global names."""
    folder = Path(__file__).parents[1] / "docs" / "examples"

    def load(name: str, run_name: str = "example") -> dict:
        sys.path.insert(0, str(folder))  # Python does the same for a script
        try:
            return runpy.run_path(str(folder / f"{name}.py"), run_name=run_name)
        finally:
            sys.path.remove(str(folder))

    return load
