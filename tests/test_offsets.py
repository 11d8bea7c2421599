"""Wrong `cu_seqlens` on a device other than the CPU: the results are NaN, and no kernel leaves its tensors.

On a CPU the ops refuse them (tests/ops/test_direct_calls.py). On a GPU reading them would sync it, so the kernels check
them. These tests call the kernels below the ops; Triton's run on the GPU if there is one, else in the interpreter.
"""

import importlib
import itertools

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels.ops import checks

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16
N = 40  # three blocks of tokens
WRONG = {
    "far beyond the end": (0, 5, 10**8),
    "beyond 32 bits": (0, 5, 2**40),
    "one too many": (0, 5, N + 1),
    "one too few": (0, 5, N - 1),
    "nothing": (0, 0, 0),
    "starts late": (1, 5, N),
    "starts before 0": (-1, 5, N),
    "far before 0": (-(2**40), 5, N),
    "negative inside": (0, -5, N),
    "too large inside": (0, N + 5, N),
    "falls": (0, 30, 10, 20, N),
    "reversed": (N, 5, 0),
    "falls after the first block": (*range(BLOCK + 1), 10, N),
}


@pytest.fixture(params=["portable", "triton"])
def kernel(request, only_the_arguments, monkeypatch):
    """A function that returns the kernel of an op."""
    for op in ("sequence_logprob", "cwdpo_loss", "constrained_sft_loss"):
        monkeypatch.setattr(f"cwdpo_kernels.triton.{op}.BLOCK_TOKENS", BLOCK)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN, and integers with their maximum
    module = f"cwdpo_kernels.{request.param}."
    yield lambda op: getattr(importlib.import_module(module + op.removesuffix("_backward")), op)
    torch.use_deterministic_algorithms(False)


def tokens():
    logp, labels = -torch.rand(N, device=DEVICE), torch.arange(N, device=DEVICE)
    labels[::3] = -100
    return logp, labels


def assert_nan(*tensors):
    for tensor in tensors:
        assert tensor.isnan().all(), tensor


wrong = pytest.mark.parametrize("values", WRONG.values(), ids=WRONG)
index_dtypes = pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)


@wrong
@index_dtypes
def test_sequence_logprob(kernel, values, dtype):
    logp, labels = tokens()
    if dtype == torch.int32 and max(map(abs, values)) >= 2**31:
        pytest.skip("no such number")
    cu_seqlens = torch.tensor(values, device=DEVICE, dtype=dtype)
    sum_logp, mean, count = kernel("sequence_logprob")(logp, labels, cu_seqlens, -100)
    assert_nan(sum_logp, mean)
    assert (count == 1).all()  # a loss leaves out answers of length 0, and with them their NaN
    ones = torch.ones_like(mean)
    grad = kernel("sequence_logprob_backward")(ones, ones, labels, count, cu_seqlens, -100)
    assert_nan(grad[labels != -100])
    assert (grad[labels == -100] == 0).all()


@wrong
@pytest.mark.parametrize("constant", [None, 0.0], ids=["cooling", "no negatives"])
@pytest.mark.parametrize("with_labels", [True, False], ids=["tokens", "sums"])
def test_cwdpo_loss(kernel, values, constant, with_labels):
    logp, labels = tokens()
    cu_seqlens = torch.tensor(values, device=DEVICE)
    pairs = (len(values) - 1) // 2
    refs = torch.zeros(2, pairs, device=DEVICE)
    count = None if with_labels else torch.zeros(2 * pairs, dtype=torch.int64, device=DEVICE)
    loss, *metrics, kept, sum_logp, mean, _, grad = kernel("cwdpo_loss")(
        logp, labels if with_labels else None, count, cu_seqlens, *refs, 0.1, -3.0, 1.0, constant, -9.0, True, -100
    )
    assert_nan(loss, *metrics[:3], sum_logp, mean, grad[labels != -100])
    assert kept.all()


@wrong
@pytest.mark.parametrize("mode", ["hinge", "hard", "smoothed"])
@pytest.mark.parametrize("weight", [0.1, 0.0])
def test_constrained_sft_loss(kernel, values, mode, weight):
    logp, labels = tokens()
    cu_seqlens = torch.tensor(values, device=DEVICE)
    loss, chosen, rejected, penalty, sum_logp, mean, _, grad = kernel("constrained_sft_loss")(
        logp, labels, None, cu_seqlens, weight, 3.0, mode, True, -100
    )
    assert_nan(loss, chosen, rejected, penalty, sum_logp, mean, grad[labels != -100])


@pytest.mark.parametrize("values", [(0, 5, N), (0, 0, N), (0, N, N), (*range(BLOCK + 2), N)], ids=lambda v: str(v[:4]))
@index_dtypes
def test_right_offsets(kernel, values, dtype):
    logp, labels = tokens()
    cu_seqlens = torch.tensor(values, device=DEVICE, dtype=dtype)
    sum_logp, _, count = kernel("sequence_logprob")(logp, labels, cu_seqlens, -100)
    spans = [slice(*bounds) for bounds in itertools.pairwise(values)]
    labeled = labels != -100
    truth = torch.stack([(logp.double() * labeled)[span].sum() for span in spans])
    torch.testing.assert_close(sum_logp.double(), truth, rtol=1e-6, atol=1e-7)
    assert count.tolist() == [int(labeled[span].sum()) for span in spans]
    loss, *_ = kernel("constrained_sft_loss")(logp, labels, None, cu_seqlens, 0.1, 3.0, "hinge", True, -100)
    assert loss.isfinite()


def test_offsets_without_a_sequence():
    """The shapes tell, so every device refuses them."""
    values = {"logp": torch.zeros(N), "labels": torch.arange(N), "cu_seqlens": torch.zeros(1, dtype=torch.int64)}
    values = {name: tensor.to("meta") for name, tensor in values.items()}
    with pytest.raises(ValueError, match=r"expected cu_seqlens to have shape \[S \+ 1\] with S >= 1, got \[1\]"):
        checks.check_arguments("sequence_logprob", values | {"ignore_index": -100})


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_public_functions_on_a_gpu(compiled):
    """No error, no sync, and NaN where the offsets are wrong, in a CUDA graph as well."""
    logp, labels = tokens()
    cu_seqlens = torch.tensor((0, 5, 10**8), device=DEVICE)
    function = torch.compile(ck.sequence_logprob, fullgraph=True) if compiled else ck.sequence_logprob
    assert_nan(*function(logp, labels, cu_seqlens)[:2])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ck.sequence_logprob(logp, labels, cu_seqlens)
    graph.replay()
    assert_nan(captured.total, captured.mean)
    cu_seqlens[-1] = N  # the same graph with right offsets
    graph.replay()
    assert captured.total.isfinite().all()
