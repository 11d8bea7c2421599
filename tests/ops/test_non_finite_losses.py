"""Losses of non-finite log-probs: an impossible answer (-inf) counts as the formula says, and a NaN stays visible."""

import numpy as np
import pytest
import torch

import cwdpo_kernels as ck
from cwdpo_kernels import reference
from cwdpo_kernels.testing import leaves, make_inputs

INF, NAN = float("inf"), float("nan")
pytestmark = pytest.mark.usefixtures("maximum_drops_nan")


def pair(total, count=2):
    total = torch.tensor(total, requires_grad=True)
    return ck.SequenceLogprob(total, total.detach() / count, torch.full(total.shape, count))


@pytest.mark.parametrize("side", ["chosen", "rejected", "reference"])
@pytest.mark.parametrize("all_pairs", [False, True], ids=["one", "all"])
def test_filtering_keeps_nan_visible(side, all_pairs):
    totals = {name: [-2.0, -4.0, -6.0] for name in ("chosen", "rejected", "reference")}
    totals[side] = [NAN] * 3 if all_pairs else [-2.0, NAN, -6.0]
    ref = torch.tensor(totals["reference"])
    cooling = ck.Cooling(drop_below=-2.5)  # drops the third pair unless it is NaN
    out = ck.cwdpo_loss(pair(totals["chosen"]), pair(totals["rejected"]), ref, ref, beta=0.1, cooling=cooling)
    assert torch.isnan(out.loss)
    assert out.kept.tolist() == [True, True, all_pairs and side == "rejected"]


def test_filtering_keeps_nan_of_tokens_visible():
    hidden, head, labels = make_inputs((4, 5), 50, 12, labelled=1.0)
    with torch.no_grad():
        hidden[3, 2, 1] = NAN
    ref = torch.full((2,), -15.0)
    cooling = ck.Cooling(drop_below=-100.0)
    out = ck.linear_cwdpo_loss(hidden, head, labels, ref, ref, beta=0.1, cooling=cooling)
    assert torch.isnan(out.loss)
    assert out.kept.all()
    assert all(torch.isnan(grad).any() for grad in torch.autograd.grad(out.loss, leaves(hidden, head)))


@pytest.mark.parametrize("constant", [None, 0.0], ids=["adaptive", "constant"])
@pytest.mark.parametrize("normalize", ["sequence", "token"])
def test_an_impossible_negative_of_weight_zero(constant, normalize):
    chosen, rejected = pair([-2.0, -4.0]), pair([-INF, -6.0])
    ref = torch.tensor([-3.0, -3.0])
    cooling = ck.Cooling(constant=constant)
    out = ck.cwdpo_loss(chosen, rejected, ref, ref, beta=0.1, cooling=cooling, normalize=normalize)
    expected = reference.cwdpo_loss(chosen, rejected, ref, ref, 0.1, cooling, normalize)
    assert torch.isfinite(expected)
    torch.testing.assert_close(out.loss, expected)
    grads = torch.autograd.grad(out.loss, [chosen.total, rejected.total])
    truths = torch.autograd.grad(expected, [chosen.total, rejected.total], allow_unused=True)
    for grad, truth in zip(grads, truths, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(grad) if truth is None else truth)
    assert out.rejected_reward[0] == -INF
    assert out.margin[0] == INF
    broken_pair = ck.cwdpo_loss(chosen, pair([NAN, -6.0]), ref, ref, beta=0.1, cooling=cooling)
    assert torch.isnan(broken_pair.loss)


def test_an_impossible_negative_with_a_weight():
    """-inf rejected: the loss of the pair is 0. -inf chosen: it is +inf, with a finite gradient."""
    ref = torch.tensor([-3.0])
    for chosen, rejected, expected in ((-2.0, -INF, 0.0), (-INF, -2.0, INF)):
        pairs = pair([chosen]), pair([rejected])
        out = ck.cwdpo_loss(*pairs, ref, ref, beta=0.1, cooling=ck.Cooling(constant=1.0))
        assert out.loss.item() == expected
        grads = torch.autograd.grad(out.loss, [p.total for p in pairs])
        assert torch.isfinite(torch.cat(grads)).all()


@pytest.mark.parametrize("mode", ["hinge", "hard", "smoothed"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_constrained_sft_with_impossible_or_broken_negatives(mode, weight):
    negatives = ck.GentleNegatives(weight=weight, mode=mode, smoothing=0.0)
    chosen, smoothing = pair([-2.0, -4.0]), torch.zeros(2)

    def loss(rejected):
        return ck.constrained_sft_loss(chosen, rejected, negatives=negatives, rejected_smoothing=smoothing).loss.item()

    impossible = loss(pair([-INF, -4.0]))
    assert impossible == (INF if mode == "smoothed" and weight else 1.5)
    assert np.isnan(loss(pair([NAN, -4.0])))


@pytest.mark.parametrize("nll_floor", [0.5, 50.0], ids=["satisfied", "violated"])
def test_a_hard_constraint_does_not_hide_broken_chosen_answers(nll_floor):
    negatives = ck.GentleNegatives(mode="hard", nll_floor=nll_floor)
    out = ck.constrained_sft_loss(pair([NAN, -4.0]), pair([-2.0, -4.0]), negatives=negatives)
    assert np.isnan(out.loss.item())
