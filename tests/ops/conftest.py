import pytest
import torch


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """In deterministic mode torch.empty is filled with NaN (integers with their maximum): reading it shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _every_backend(backend):
    """The tests of an op are the contract of all its backends."""


@pytest.fixture
def exact_dtype(backend):
    """The most exact dtype that a backend computes itself: float64 always runs `portable`."""
    return torch.float32 if backend == "triton" else torch.float64


@pytest.fixture
def close(exact_dtype):
    """assert_close within the rounding of `exact_dtype`: both sides are computed in it, in different orders."""
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if exact_dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    return lambda actual, expected: torch.testing.assert_close(actual, expected, **tolerance)
