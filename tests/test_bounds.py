"""No kernel loads or stores outside the tensors of its launch: every op, whole and partial tiles, labels of any value.

A wrong mask often changes no result: what it reads is masked later, and what it writes belongs to nobody.
"""

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import ops
from cwdpo_kernels.testing import make_inputs

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter does not run", allow_module_level=True)
import mock_gpu

# Tokens, vocabulary and hidden size are no multiples of a tile. Rows of D 72 are aligned for tensor descriptors.
N, V = 37, 140
KINDS = [(torch.bfloat16, 72), (torch.float16, 33), (torch.float32, 72)]
DTYPES = pytest.mark.parametrize(("dtype", "dim"), KINDS, ids=str)
HEADS = pytest.mark.parametrize("transform", [{}, {"bias": True, "softcap": 20.0}], ids=str)
BUDGETS = [(False, 0, 0), (True, 1, 0), (True, 0, 20_000), (False, 1, -1)]  # sparse_grad, workspace_bytes, kept_bytes
IGNORE_INDEX = 7  # inside the vocabulary
OUTSIDE = (V, -7, 2**31, 2**32 + 5, -(2**33))


@pytest.fixture(autouse=True)
def _gpu(only_the_arguments, monkeypatch):
    for op in ("sequence_logprob", "cwdpo_loss", "constrained_sft_loss"):
        monkeypatch.setattr(f"cwdpo_kernels.triton.{op}.BLOCK_TOKENS", 16)
    with mock_gpu.running(), torch.device("cuda"), ops.forced("cuda", "triton"):
        yield


def with_labels(labels):
    """Every fourth label is ignored. At the end are those outside the vocabulary."""
    labels = labels.clone()
    labels[::4] = IGNORE_INDEX
    labels[-len(OUTSIDE) :] = torch.tensor(OUTSIDE)
    return labels


def inputs(dtype, dim, transform):
    hidden, head, labels = make_inputs((N,), V, dim, dtype, **transform)
    return hidden, head, with_labels(labels)


@DTYPES
@HEADS
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_linear_logprob(dtype, dim, transform, frozen):
    hidden, head, labels = inputs(dtype, dim, transform)
    weight, bias = (head.weight.detach(), head.bias if head.bias is None else head.bias.detach())
    leaves = [hidden]
    if not frozen:
        weight = weight.requires_grad_()
        leaves += [weight] if bias is None else [weight, bias.requires_grad_()]
    for sparse_grad, workspace_bytes, kept_bytes in BUDGETS[:2] if frozen else BUDGETS:
        logp, *_ = torch.ops.cwdpo.linear_logprob(
            hidden, weight, bias, labels, head.scale, head.softcap, IGNORE_INDEX, frozen, sparse_grad,
            workspace_bytes, kept_bytes,
        )  # fmt: skip
        torch.autograd.grad(logp.sum(), leaves)
        assert logp[-len(OUTSIDE) :].isnan().all()


@DTYPES
@HEADS
def test_token_stats(dtype, dim, transform):
    hidden, head, labels = inputs(dtype, dim, transform)
    stats = ck.token_stats(hidden, head, labels, ignore_index=IGNORE_INDEX)
    torch.autograd.grad((stats.logp + stats.entropy).sum(), [hidden, head.weight])
    frozen = ck.Head(head.weight.detach(), None, head.scale, head.softcap)
    stats = ck.token_stats(hidden, frozen, labels, ignore_index=IGNORE_INDEX, expect_entropy_grad=False)
    torch.autograd.grad(stats.logp.sum(), hidden)
    assert stats.logp[-len(OUTSIDE) :].isnan().all()


@DTYPES
@HEADS
def test_token_divergence(dtype, dim, transform):
    (hidden_p, head_p, _), (hidden_q, head_q, _) = inputs(dtype, dim, transform), inputs(dtype, dim + 8, {})
    assert ck.token_divergence(hidden_p, head_p, hidden_q, head_q).js.isfinite().all()


@pytest.mark.parametrize("reuse_logits", [False, True])
@pytest.mark.parametrize("vocab", [V, 1])
def test_logits_logprob(reuse_logits, vocab):
    logits = torch.randn(N, vocab, dtype=torch.bfloat16).requires_grad_()
    labels = with_labels(torch.zeros(N, dtype=torch.int64))
    logp = ck.logits_logprob(logits * 1, labels, reuse_logits=reuse_logits, ignore_index=IGNORE_INDEX)
    torch.autograd.grad(logp.sum(), logits)
    assert logp[-1:].isnan().all()


@pytest.mark.parametrize("pairs", [1, 3])
def test_sequences_and_losses(pairs):
    logp = -torch.rand(N).requires_grad_()
    labels = with_labels(torch.zeros(N, dtype=torch.int64))
    cu_seqlens = torch.linspace(0, N, 2 * pairs + 1).long()
    total, mean, _ = ck.sequence_logprob(logp, labels, cu_seqlens, ignore_index=IGNORE_INDEX)
    torch.autograd.grad((total + mean).sum(), logp)
    count = torch.ones(2 * pairs, dtype=torch.int64)
    refs = torch.zeros(pairs), torch.zeros(pairs)  # apart, so that one does not go on in the other
    for given in ((labels, None, cu_seqlens), (None, count, torch.arange(2 * pairs + 1))):
        values = logp if given[0] is not None else total
        torch.ops.cwdpo.cwdpo_loss(values, *given, *refs, 0.1, -3.0, 1.0, None, -9.0, True, IGNORE_INDEX)
        torch.ops.cwdpo.constrained_sft_loss(values, *given, 0.1, 3.0, "hinge", True, IGNORE_INDEX)


def test_labels_of_32_bits_cannot_have_any_ignore_index():
    """The sweep compared them with its lower 32 bits in one place and not in another, and wrote past the last token."""
    hidden, head, labels = make_inputs((N,), V, 33, torch.float32)
    weight, labels, ignore_index = head.weight.detach(), labels.int(), 2**32 + 5
    cu_seqlens = torch.tensor([0, N])
    calls = [
        lambda: torch.ops.cwdpo.linear_logprob(
            hidden, weight, None, labels, 1.0, None, ignore_index, True, False, 0, 0
        ),
        lambda: torch.ops.cwdpo.logits_logprob(hidden, labels, ignore_index, False),
        lambda: torch.ops.cwdpo.sequence_logprob(torch.zeros(N), labels, cu_seqlens, ignore_index),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"an integer in \[-2\^31, 2\^31\) \(labels are torch.int32\)"):
            call()


def test_a_planted_access_outside_is_noticed():
    """Also one by an integer mask, which numpy would take for indices."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, N, STORE: tl.constexpr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        inside = (offs <= N) & (tl.min(offs, 0) < N)
        if STORE:
            tl.store(x_ptr + offs, 0.0, mask=inside)
        else:
            tl.load(x_ptr + offs, mask=inside)

    x = torch.zeros(6)
    kernel[(1,)](x, 5, True, 16)
    for store in (True, False):
        with pytest.raises(Exception, match="a kernel touches memory outside its tensors"):
            kernel[(1,)](x, 6, store, 16)
