import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import leaves, make_inputs

NEGATIVES = [
    pytest.param(ck.GentleNegatives(weight=0.3, nll_floor=50.0), id="active"),
    pytest.param(ck.GentleNegatives(weight=0.3, nll_floor=0.5), id="satisfied"),
    pytest.param(ck.GentleNegatives(weight=0.3, nll_floor=500.0, normalize="sequence"), id="sequence"),
    pytest.param(ck.GentleNegatives(mode="hard", nll_floor=50.0), id="hard-violated"),
    pytest.param(ck.GentleNegatives(mode="hard", nll_floor=0.5), id="hard-satisfied"),
    pytest.param(ck.GentleNegatives(mode="hard", nll_floor=500.0, normalize="sequence"), id="hard-sequence"),
    pytest.param(ck.GentleNegatives(weight=0.3, mode="smoothed", smoothing=0.2), id="smoothed"),
    pytest.param(ck.GentleNegatives(weight=0.3, mode="smoothed", normalize="sequence"), id="smoothed-sequence"),
    pytest.param(ck.GentleNegatives(weight=0.0), id="plain-sft"),
]


def make_batch(dtype, **options):
    hidden, head, labels = make_inputs((6, 9), 101, 12, dtype, **options)
    labels[1], labels[5] = -100, -100
    return hidden, head, labels


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_against_full_logits(negatives, exact_dtype, close):
    hidden, head, labels = make_batch(exact_dtype, bias=True, scale=0.7)
    truth = reference.constrained_sft_loss(reference.head_logits(hidden, head), labels, negatives)
    out = ck.linear_constrained_sft_loss(hidden, head, labels, negatives=negatives)
    close(out.loss, truth)
    violated = negatives.mode == "hard" and out.penalty > 0
    close(out.loss, out.penalty if violated else out.chosen_nll + out.penalty)
    grads = (torch.autograd.grad(loss, leaves(hidden, head)) for loss in (out.loss, truth))
    for actual, expected in zip(*grads, strict=True):
        close(actual, expected)

    packed = ck.linear_constrained_sft_loss(
        hidden.flatten(0, 1), head, labels.flatten(), negatives=negatives, cu_seqlens=torch.arange(7) * 9
    )
    close(packed.loss, truth)


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_from_sequences(negatives, exact_dtype, close):
    hidden, head, labels = make_batch(exact_dtype)
    fused = ck.linear_constrained_sft_loss(hidden, head, labels, negatives=negatives)
    sequences = ck.linear_sequence_logprob(hidden, head, labels)
    chosen, rejected = (ck.SequenceLogprob(*(x[part] for x in sequences)) for part in (slice(0, 3), slice(3, 6)))
    logits = reference.head_logits(hidden, head)
    safe = labels.clamp_min(0)[..., None]
    spread = (logits.gather(-1, safe).squeeze(-1) - logits.mean(-1)) * (labels != -100)
    out = ck.constrained_sft_loss(chosen, rejected, negatives=negatives, rejected_smoothing=spread[3:].sum(1))
    close(out.loss, fused.loss)
    grads = (torch.autograd.grad(loss, leaves(hidden, head)) for loss in (out.loss, fused.loss))
    for actual, expected in zip(*grads, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("mode", ["hinge", "hard", "smoothed"])
def test_nothing_labeled(mode, exact_dtype):
    hidden, head, _ = make_batch(exact_dtype)
    labels = torch.full((6, 9), -100)
    out = ck.linear_constrained_sft_loss(hidden, head, labels, negatives=ck.GentleNegatives(1.0, 5.0, mode))
    assert [x.item() for x in out[:4]] == [0.0, 0.0, 0.0, 0.0]
    for grad in torch.autograd.grad(out.loss, leaves(hidden, head)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_smoothing_refuses_a_soft_cap(exact_dtype):
    hidden, head, labels = make_batch(exact_dtype, softcap=5.0)
    with pytest.raises(NotImplementedError, match="soft cap"):
        ck.linear_constrained_sft_loss(hidden, head, labels, negatives=ck.GentleNegatives(mode="smoothed"))
