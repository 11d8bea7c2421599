import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import make_inputs

LENGTHS = [0, 5, 1, 0, 7, 3]


def packed(dtype):
    logp = -torch.rand(sum(LENGTHS), dtype=dtype, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    labels = torch.arange(sum(LENGTHS))
    labels[[0, 3, 5]] = -100  # the sequence of length 1 has no label
    return logp.requires_grad_(), labels, torch.tensor([0, *LENGTHS]).cumsum(0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_packed(index_dtype, exact_dtype, close):
    logp, labels, cu_seqlens = packed(exact_dtype)
    ours = ck.sequence_logprob(logp, labels, cu_seqlens.to(index_dtype))
    truth = reference.sequence_logprob(logp, labels, cu_seqlens)
    assert torch.equal(ours.count, truth.count)
    assert ours.count.tolist() == [0, 3, 0, 0, 7, 3]
    close(ours.total, truth.total)
    close(ours.mean, truth.mean)
    assert ours.mean[0] == 0
    weights = torch.randn(2, len(LENGTHS), dtype=exact_dtype)
    a, b = (torch.autograd.grad((weights[0] * s.total + weights[1] * s.mean).sum(), logp)[0] for s in (ours, truth))
    close(a, b)
    assert a[labels == -100].eq(0).all()


def test_padded_equals_packed(exact_dtype):
    logp, labels = -torch.rand(4, 6), torch.randint(-1, 3, (4, 6)).mul(50)
    padded = ck.sequence_logprob(logp, labels, ignore_index=-50)
    flat = ck.sequence_logprob(logp.flatten(), labels.flatten(), torch.arange(5) * 6, ignore_index=-50)
    assert all(torch.equal(a, b) for a, b in zip(padded, flat, strict=True))


def test_values_of_ignored_tokens_do_not_matter():
    logp = torch.tensor([[-1.0, float("nan"), float("-inf"), -2.0]], requires_grad=True)
    out = ck.sequence_logprob(logp, torch.tensor([[1, -100, -100, 2]]))
    assert (out.total.item(), out.mean.item(), out.count.item()) == (-3.0, -1.5, 2)
    out.total.backward()
    assert logp.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]


def test_half_precision_inputs_are_summed_in_float32():
    logp = torch.full((1, 4096), -1.001, dtype=torch.bfloat16)
    total = ck.sequence_logprob(logp, torch.zeros(1, 4096, dtype=torch.long)).total
    assert total.dtype == torch.float32
    assert total.item() == logp.double().sum().item()


def test_gradcheck():
    logp, labels, cu_seqlens = packed(torch.float64)
    assert torch.autograd.gradcheck(lambda x: ck.sequence_logprob(x, labels, cu_seqlens)[:2], logp)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches(shape):
    out = ck.sequence_logprob(torch.zeros(shape), torch.zeros(shape, dtype=torch.long))
    assert [field.tolist() for field in out] == [[0.0] * shape[0], [0.0] * shape[0], [0] * shape[0]]


def test_fused_layouts_agree(exact_dtype, close):
    """linear_sequence_logprob and logits_sequence_logprob, padded and packed, equal the reference."""
    hidden, head, labels = make_inputs((4, 6), 50, 12, exact_dtype)
    truth = reference.sequence_logprob(reference.linear_logprob(hidden, head, labels), labels)
    logits = reference.head_logits(hidden, head)
    cu_seqlens = torch.arange(5) * 6
    for out in (
        ck.linear_sequence_logprob(hidden, head, labels),
        ck.linear_sequence_logprob(hidden.flatten(0, 1), head, labels.flatten(), cu_seqlens),
        ck.logits_sequence_logprob(logits, labels),
        ck.logits_sequence_logprob(logits.flatten(0, 1), labels.flatten(), cu_seqlens),
    ):
        for actual, expected in zip(out, truth, strict=True):
            close(actual, expected)


def test_shift_labels():
    labels = torch.tensor([[1, 2, 3], [4, 5, -100]])
    assert ck.shift_labels(labels).tolist() == [[2, 3, -100], [5, -100, -100]]
    packed_labels = torch.tensor([1, 2, 3, 4, 5, 6])
    cu_seqlens = torch.tensor([0, 0, 2, 3, 3, 6])
    assert ck.shift_labels(packed_labels, cu_seqlens).tolist() == [2, -100, -100, 5, 6, -100]
    assert ck.shift_labels(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)
    assert ck.shift_labels(packed_labels[:0], torch.tensor([0, 0])).tolist() == []
