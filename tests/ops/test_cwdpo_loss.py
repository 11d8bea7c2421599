import math

import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import as_float64, leaves, make_inputs, relative_error

COOLINGS = [
    pytest.param(ck.Cooling(logp_floor=-7.0, temperature=0.7), id="adaptive"),
    pytest.param(ck.Cooling(constant=1.0), id="vanilla"),
    pytest.param(ck.Cooling(constant=0.3), id="constant"),
    pytest.param(ck.Cooling(logp_floor=-7.0, drop_below=-8.0), id="filtered"),
]


def make_pairs(dtype):
    """Five pairs, one with an empty chosen answer and one with an empty rejected answer."""
    hidden, head, labels = make_inputs((10, 9), 101, 12, dtype)
    labels[1], labels[7] = -100, -100
    refs = -20 * torch.rand(
        2, 5, generator=torch.Generator(torch.get_default_device()).manual_seed(1), dtype=torch.float64
    )
    return hidden, head, labels, refs[0].to(dtype), refs[1].to(dtype)


def split(sequences):
    return (ck.SequenceLogprob(*(x[:5] for x in sequences)), ck.SequenceLogprob(*(x[5:] for x in sequences)))


@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("cooling", COOLINGS)
def test_every_entry_point_gives_the_paper_loss(cooling, normalize, exact_dtype, close):
    hidden, head, labels, ref_chosen, ref_rejected = make_pairs(exact_dtype)
    options = {"beta": 0.1, "cooling": cooling, "normalize": normalize}
    chosen, rejected = split(reference.sequence_logprob(reference.linear_logprob(hidden, head, labels), labels))
    truth = reference.cwdpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options)
    grads = torch.autograd.grad(truth, leaves(hidden, head), retain_graph=True)

    logits, cu_seqlens = reference.head_logits(hidden, head), torch.arange(11) * 9
    flat = hidden.flatten(0, 1), head, labels.flatten()
    for out in (
        ck.cwdpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options),
        ck.linear_cwdpo_loss(hidden, head, labels, ref_chosen, ref_rejected, **options),
        ck.linear_cwdpo_loss(*flat, ref_chosen, ref_rejected, cu_seqlens=cu_seqlens, **options),
        ck.logits_cwdpo_loss(logits, labels, ref_chosen, ref_rejected, **options),
        ck.logits_cwdpo_loss(logits * 1.0, labels, ref_chosen, ref_rejected, reuse_logits=True, **options),
    ):
        close(out.loss, truth)
        for a, b in zip(torch.autograd.grad(out.loss, leaves(hidden, head), retain_graph=True), grads, strict=True):
            close(a, b)
        assert not any(x.requires_grad for x in (*out[1:6], *out.chosen_logp, *out.rejected_logp, out.kept))
        assert out.kept[[1, 2]].tolist() == [False, False]
        assert out.kept[[0, 3]].all()
        assert out.kept[4] == (cooling.drop_below is None)  # the mean log-prob of its rejected answer is -8.65


def test_metrics():
    chosen = ck.SequenceLogprob(torch.tensor([-4.0, -6.0]), torch.tensor([-2.0, -3.0]), torch.tensor([2, 2]))
    rejected = ck.SequenceLogprob(torch.tensor([-9.0, -2.0]), torch.tensor([-3.0, -1.0]), torch.tensor([3, 2]))
    ref = torch.tensor([-5.0, -5.0])
    out = ck.cwdpo_loss(chosen, rejected, ref, ref, beta=0.5, cooling=ck.Cooling(logp_floor=-2.0, temperature=0.5))
    weight = [1 / (1 + math.exp(2.0)), 1 / (1 + math.exp(-2.0))]
    torch.testing.assert_close(out.cooling_weight, torch.tensor(weight))
    assert out.chosen_reward.tolist() == [0.5, -0.5]
    assert out.rejected_reward.tolist() == [-2.0, 1.5]
    assert out.margin.tolist() == [2.5, -2.0]
    assert out.accuracy.tolist() == [1.0, 0.0]
    logits = [0.5 * (1 - weight[0] * -4), 0.5 * (-1 - weight[1] * 3)]
    assert out.loss.item() == pytest.approx(sum(math.log1p(math.exp(-x)) for x in logits) / 2, rel=1e-6)
    with_references = ck.cwdpo_loss(
        chosen,
        rejected,
        rejected._replace(total=ref),
        chosen._replace(total=ref),
        beta=0.5,
        cooling=ck.Cooling(-2.0, 0.5),
    )
    assert torch.equal(with_references.loss, out.loss)


def test_the_gradient_treats_the_cooling_weight_as_a_constant():
    rejected = torch.tensor([-3.0], requires_grad=True)
    chosen = ck.SequenceLogprob(torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([1]))
    cooling = ck.Cooling(logp_floor=-3.0, temperature=0.1)
    ref = torch.tensor([-2.0])
    out = ck.cwdpo_loss(
        chosen, ck.SequenceLogprob(rejected, rejected, torch.tensor([1])), ref, ref, beta=1.0, cooling=cooling
    )
    out.loss.backward()
    logit = 1.0 - 0.5 * -1.0
    assert rejected.grad.item() == pytest.approx(0.5 / (1 + math.exp(logit)), rel=1e-6)
    assert not ck.cooling_weight(rejected, cooling).requires_grad


def test_gradcheck_with_a_constant_weight():
    hidden, head, labels = make_inputs((4, 3), 11, 4, torch.float64)
    ref_chosen, ref_rejected = torch.tensor([[-3.0, -2.0], [-1.0, -5.0]], dtype=torch.float64)

    def loss(hidden, weight):
        return ck.linear_cwdpo_loss(
            hidden, weight, labels, ref_chosen, ref_rejected, beta=0.1, cooling=ck.Cooling(constant=0.4)
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, head.weight), atol=1e-7)


@pytest.mark.parametrize("empty", ["chosen", "rejected", "all"])
def test_no_pair_left(empty):
    hidden, head, labels = make_inputs((4, 6), 50, 12, labelled=1.0)
    labels[{"chosen": slice(0, 2), "rejected": slice(2, 4), "all": slice(None)}[empty]] = -100
    out = ck.linear_cwdpo_loss(hidden, head, labels, torch.zeros(2), torch.zeros(2), beta=0.1, cooling=ck.Cooling())
    assert out.loss.item() == 0.0
    assert not out.kept.any()
    assert all(torch.isfinite(x).all() for x in (*out[1:6], *out.chosen_logp, *out.rejected_logp))
    for grad in torch.autograd.grad(out.loss, leaves(hidden, head)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_extreme_margins_stay_finite():
    chosen = ck.SequenceLogprob(
        torch.tensor([-1e5, 0.0], requires_grad=True), torch.tensor([-1e4, 0.0]), torch.tensor([10, 10])
    )
    rejected = ck.SequenceLogprob(torch.tensor([0.0, -1e5]), torch.tensor([0.0, -1e4]), torch.tensor([10, 10]))
    out = ck.cwdpo_loss(chosen, rejected, torch.zeros(2), torch.zeros(2), beta=1.0, cooling=ck.Cooling(constant=1.0))
    assert out.loss.item() == pytest.approx(5e4)
    out.loss.backward()
    assert chosen.total.grad.tolist() == [-0.5, 0.0]


@pytest.mark.parametrize("tokens", [0, 3])
def test_filtered_batches_without_a_label(tokens):
    hidden, head, labels = make_inputs((4, tokens), 50, 12, labelled=0.0)
    cooling = ck.Cooling(drop_below=-5.0)
    out = ck.linear_cwdpo_loss(hidden, head, labels, torch.zeros(2), torch.zeros(2), beta=0.1, cooling=cooling)
    assert out.loss.item() == 0
    for tensor, grad in zip(leaves(hidden, head), torch.autograd.grad(out.loss, leaves(hidden, head)), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.slow_interpreted
def test_a_realistic_step_within_1e5_of_float64():
    """Loss and gradients of 2 pairs, T 1024, 128 response tokens, V 49152, D 576, float32, against full logits."""
    hidden, head, labels = make_inputs((4, 1024), 49152, 576, labelled=1.0, logit_std=2.0)
    labels[:, :-128] = -100
    hidden64, head64 = as_float64(hidden, head)
    refs = torch.full((2, 2), -1500.0)
    options = {"beta": 0.1, "cooling": ck.Cooling(logp_floor=-12.0, temperature=1.0)}
    out = ck.linear_cwdpo_loss(hidden, head, labels, *refs, **options)
    answers = hidden64[:, -128:]
    logp = reference.linear_logprob(answers, head64, labels[:, -128:])
    sequences = reference.sequence_logprob(logp, labels[:, -128:])
    chosen, rejected = (ck.SequenceLogprob(*(x[part] for x in sequences)) for part in (slice(0, 2), slice(2, 4)))
    truth = reference.cwdpo_loss(chosen, rejected, *refs.double(), **options)

    assert relative_error(out.loss, truth) < 1e-5
    assert relative_error(out.chosen_logp.total, chosen.total) < 1e-5
    ours = torch.autograd.grad(out.loss, leaves(hidden, head))
    for actual, expected in zip(ours, torch.autograd.grad(truth, leaves(hidden64, head64)), strict=True):
        assert relative_error(actual, expected) < 1e-5
    frozen = ck.linear_cwdpo_loss(hidden, head.weight.detach(), labels, *refs, **options)
    assert relative_error(torch.autograd.grad(frozen.loss, hidden)[0], ours[0]) < 1e-5


@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_rewards_are_zero_while_policy_and_reference_are_equal(normalize, frozen):
    hidden, head, labels = make_inputs((10, 19), 211, 24, torch.float32)
    head = ck.Head(head.weight.detach()) if frozen else head
    with torch.no_grad():
        reference = ck.linear_sequence_logprob(hidden, head, labels).total
    out = ck.linear_cwdpo_loss(
        hidden, head, labels, *reference.chunk(2), beta=0.3, cooling=COOLINGS[0].values[0], normalize=normalize
    )
    for name in ("chosen_reward", "rejected_reward", "margin", "accuracy"):
        assert not getattr(out, name).any(), name
