"""The mock GPU refuses what a GPU refuses. Each test plants an error that a CPU run of a test would not notice."""

import contextlib

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import ops
from cwdpo_kernels.testing import leaves, make_inputs, relative_error

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("there is a GPU", allow_module_level=True)
import mock_gpu

MADE_AT_IMPORT = torch.arange(3.0)


@pytest.fixture(autouse=True)
def _gpu():
    with mock_gpu.running(), torch.device("cuda"), ops.forced("cuda", "triton"):
        yield


def test_tensors_say_that_they_are_on_the_gpu():
    x = torch.zeros(2, 3)
    assert x.is_cuda
    assert x.device == torch.device("cuda", 0) == torch.get_default_device()
    assert (x.cpu().device.type, x.cpu().cuda().device.type, x.to("cuda:1").device.index) == ("cpu", "cuda", 1)
    x[0, [1, 2]] = 5
    x[1] += x[0]
    assert x.tolist() == [[0, 5, 5], [0, 5, 5]]
    assert x.sum().item() == 20


@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_generator_of_another_device_is_refused(device):
    wrong = torch.Generator() if device is None else torch.Generator("cuda")
    with pytest.raises(RuntimeError, match="device type for generator but found"):
        torch.randn(3, generator=wrong.manual_seed(0), device=device)
    right = torch.Generator("cuda" if device is None else "cpu").manual_seed(0)
    assert torch.randn(3, generator=right, device=device).is_cuda == (device is None)


def test_a_tensor_made_at_import_is_refused():
    with pytest.raises(RuntimeError, match=r"on the same device, but found at least two: cpu and cuda:0 \(aten.add"):
        torch.zeros(3) + MADE_AT_IMPORT
    with pytest.raises(ValueError, match=r"expected labels to have device cuda:0 \(as hidden\), got cpu"):
        ck.linear_logprob(torch.randn(3, 8), torch.randn(5, 8), MADE_AT_IMPORT.long())


def test_autocast_of_the_cpu_does_nothing():
    x = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.float32
        assert (x.cpu() @ x.cpu()).dtype == torch.bfloat16


def test_a_gpu_tensor_has_no_numpy_array():
    with pytest.raises(TypeError, match="can't convert cuda"):
        torch.zeros(3).numpy()


def step(device):
    """(log-probs, gradients), and their float64 truth."""
    with torch.device(device):
        hidden, head, labels = make_inputs((20,), 101, 16, torch.bfloat16)
        logp = ck.linear_logprob(hidden, head, labels)
    return logp, torch.autograd.grad(logp.sum(), leaves(hidden, head))


def test_kernels_launch_on_the_gpu_of_their_tensors():
    """cuda:0 is the current GPU. The log-probs on cuda:1 are those on the CPU."""
    logp, grads = step("cuda:1")
    assert {x.device for x in (logp, *grads)} == {torch.device("cuda", 1)}
    truth, true_grads = step("cpu")
    for actual, expected in zip((logp, *grads), (truth, *true_grads), strict=True):
        assert relative_error(actual.cpu(), expected) < 5e-3


def test_a_launch_without_a_device_guard_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    with pytest.raises(ValueError, match="cannot be accessed from Triton: on cuda:1, launched on cuda:0"):
        step("cuda:1")
