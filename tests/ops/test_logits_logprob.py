import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.portable import logits_logprob as portable
from cwdpo_kernels.testing import check_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make_logits(shape=(5, 13), vocab=507, dtype=torch.float32, std=3.0):
    random = torch.Generator(torch.get_default_device()).manual_seed(0)
    logits = (torch.randn(*shape, vocab, generator=random) * std).to(dtype).requires_grad_()
    labels = torch.randint(vocab, shape, generator=random)
    labels[torch.rand(shape, generator=random) < 0.3] = -100
    return logits, labels


@pytest.mark.parametrize("block_bytes", [1, 4 << 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_error_budget(dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(portable, "BLOCK_BYTES", block_bytes)
    logits, labels = make_logits(dtype=dtype)
    exact = logits.detach().double().requires_grad_()
    upstream = torch.randn(labels.shape)
    results = []
    for function, leaf in (
        (ck.logits_logprob, logits),
        (reference.logits_logprob, logits),
        (reference.logits_logprob, exact),
    ):
        logp = function(leaf, labels)
        results.append((logp, *torch.autograd.grad(logp, leaf, upstream.to(logp.dtype))))
    for name, ours, eager, truth in zip(("logp", "grad_logits"), *results, strict=True):
        check_budget(name, ours, eager, truth)
    assert (results[0][0] <= 0).all()


def test_huge_logits_are_exact():
    logits = torch.linspace(-1e4, 1e4, 507).repeat(3, 1).requires_grad_()
    labels = torch.tensor([0, 506, 250])
    logp = ck.logits_logprob(logits, labels)
    truth = torch.log_softmax(logits.double(), -1)[torch.arange(3), labels]
    torch.testing.assert_close(logp.double(), truth, rtol=1e-6, atol=1e-15)
    logp.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_gradcheck():
    logits, labels = make_logits((4,), 7, torch.float64)
    assert torch.autograd.gradcheck(lambda x: ck.logits_logprob(x, labels), logits)


def test_reused_logits_hold_the_gradient():
    leaf, labels = make_logits()
    expected = torch.autograd.grad(ck.logits_logprob(leaf, labels)[:, 1:].sum(), leaf)[0]
    logits = leaf * 1.0
    logp = ck.logits_logprob(logits, labels, reuse_logits=True)
    (grad,) = torch.autograd.grad(logp[:, 1:].sum(), logits, retain_graph=True)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logp.sum(), logits)


@pytest.mark.parametrize("shape", [(0,), (4,)])
def test_nothing_labeled(shape):
    logits, _ = make_logits(shape)
    logp = ck.logits_logprob(logits, torch.full(shape, -100))
    assert torch.equal(logp, torch.zeros(shape))
    assert torch.equal(torch.autograd.grad(logp.sum(), logits)[0], torch.zeros_like(logits))


def test_a_vocabulary_of_one():
    logits = torch.randn(3, 1, requires_grad=True)
    logp = ck.logits_logprob(logits, torch.zeros(3, dtype=torch.long))
    assert torch.equal(logp, torch.zeros(3))
    assert torch.equal(torch.autograd.grad(logp.sum(), logits)[0], torch.zeros(3, 1))


def test_non_contiguous_logits():
    logits, labels = make_logits()
    strided = logits.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ck.logits_logprob(strided, labels), ck.logits_logprob(logits, labels))
    with pytest.raises(ValueError, match="expected logits to have layout contiguous"):
        ck.logits_logprob(strided, labels, reuse_logits=True)


def layouts(vocab=507, rows=6):
    """Views [rows, vocab] into memory [size] that is larger, by name."""
    return {
        "transposed": ((rows + 2) * vocab, lambda memory: memory.view(vocab, rows + 2).T[1:-1]),
        "every second column": (2 * rows * vocab, lambda memory: memory.view(rows, 2 * vocab)[:, 1::2]),
        "some columns": (rows * (vocab + 9), lambda memory: memory.view(rows, vocab + 9)[:, 4:-5]),
        "every second row": (2 * rows * vocab, lambda memory: memory.view(rows, 2, vocab)[:, 1]),
        "one column": (rows * 3, lambda memory: memory.view(rows, 3)[:, 1:2]),
        "a column of one row": (3 * vocab, lambda memory: memory.view(vocab, 3)[:, 1:2].T),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_backward_in_place_of_strided_logits(layout, dtype, only_the_arguments):
    """Right in every layout, and the memory between the logits stays as it was."""
    size, view = layouts()[layout]
    memory = (torch.randn(size, generator=torch.Generator(torch.get_default_device()).manual_seed(0)) * 3).to(dtype)
    before, logits = memory.clone(), view(memory)
    rows, vocab = logits.shape
    labels = torch.arange(rows) * 7 % vocab
    labels[1::3] = -100
    upstream = torch.randn(rows).to(torch.float64 if dtype == torch.float64 else torch.float32)
    upstream[2:3] = 0
    results = []
    for function, leaf in (
        (reference.logits_logprob, logits.detach().clone().requires_grad_()),
        (reference.logits_logprob, logits.detach().double().requires_grad_()),
    ):
        logp = function(leaf, labels)
        results.append((logp, *torch.autograd.grad(logp, leaf, upstream.to(logp.dtype))))
    saved = torch.ops.cwdpo.logits_logprob(logits, labels, -100, True)
    elsewhere = torch.ops.cwdpo.logits_logprob_backward(upstream, logits, labels, *saved, -100)
    torch.ops.cwdpo.logits_logprob_backward_(upstream, logits, labels, *saved, -100)
    assert torch.equal(logits, elsewhere)
    for name, ours, eager, truth in zip(("logp", "grad_logits"), (saved[0], logits), *results, strict=True):
        check_budget(name, ours, eager, truth)
    outside = torch.ones(size, dtype=torch.bool)
    view(outside).fill_(False)
    assert torch.equal(memory[outside], before[outside])


@pytest.mark.parametrize(
    ("size", "stride"), [((6, 507), (0, 1)), ((6, 507), (1, 1)), ((6, 507), (506, 1)), ((6, 5), (5, 0))], ids=str
)
def test_backward_in_place_of_logits_that_share_memory(size, stride):
    logits = torch.randn(6 * 507).as_strided(size, stride)
    labels, one = torch.zeros(6, dtype=torch.long), torch.ones(6)
    saved = torch.ops.cwdpo.logits_logprob(logits, labels, -100, True)
    before = logits.clone()
    with pytest.raises((ValueError, RuntimeError), match="expected logits to have layout"):
        torch.ops.cwdpo.logits_logprob_backward_(one, logits, labels, *saved, -100)
    assert torch.equal(logits, before)
