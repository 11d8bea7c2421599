import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_uninitialized_memory():
    """Deterministic mode fills torch.empty with NaN (integers with their maximum), so that reading it is noticed."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _every_backend(backend):
    """Run every test of an op once per backend."""


@pytest.fixture
def exact_dtype(backend):
    """The most exact dtype that the backend computes itself. Triton leaves float64 to `portable`."""
    return torch.float32 if backend == "triton" else torch.float64


@pytest.fixture
def close(exact_dtype):
    """assert_close within the rounding of `exact_dtype`, because both sides sum in different orders."""
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if exact_dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    return lambda actual, expected: torch.testing.assert_close(actual, expected, **tolerance)


@pytest.fixture
def maximum_drops_nan(monkeypatch, backend):
    """tl.maximum and tl.minimum return the number if one operand is NaN, as on a GPU; the interpreter returns NaN."""
    if backend == "triton" and not torch.cuda.is_available():
        from triton.runtime.interpreter import InterpreterBuilder

        for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
            operation = lambda self, a, b, function=function: self.binary_op(a, b, function)  # noqa: E731
            monkeypatch.setattr(InterpreterBuilder, name, operation)
