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
