"""Preference losses against their definitions in 60 digits (definitions.py): values, gradients, and the edges."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from preference.definitions import LARGE, TABLE, Pair, Row

import cwdpo_kernels as ck
from cwdpo_kernels import preference, reference
from cwdpo_kernels.preference import (
    CPO,
    DPO,
    EXO,
    IPO,
    ORPO,
    CoolingWeighted,
    DiscoPOP,
    Hinge,
    Robust,
    SimPO,
    functional,
)
from cwdpo_kernels.testing import as_float64, leaves, make_inputs, relative_error

PAIRS = [
    Pair(-12.3, -20.1, 5, 7, -13.0, -18.5),
    Pair(-3.0, -2.5, 2, 3, -2.2, -6.0),
    Pair(-0.001, -50.0, 4, 9, -0.5, -49.0),
    Pair(-40.0, -1.5, 11, 2, -41.5, -9.0),
    Pair(-7.0, -9.0, 3, 3, -7.0, -9.0),  # the policy is the reference
    Pair(-1e-12, -1e-9, 1, 1, -1e-3, -1e-3),
]
HUGE = [
    Pair(-1.0, -1e4, 2, 3, -1.5, -2.0),
    Pair(-1e4, -1.0, 2, 3, -1.5, -2.0),
    Pair(-1.0, -1e30, 2, 3, -1.5, -2.0),
    Pair(-1e30, -1.0, 2, 3, -1.5, -2.0),
    Pair(-1.0, -2.0, 2, 3, -1e30, -2.0),
    Pair(-1.0, -2.0, 2, 3, -1.5, -1e30),
]
INFINITE = [
    Pair(-1.0, -math.inf, 2, 3, -1.5, -2.0),
    Pair(-math.inf, -1.0, 2, 3, -1.5, -2.0),
    Pair(-1.0, -2.0, 2, 3, -math.inf, -2.0),
    Pair(-1.0, -2.0, 2, 3, -1.5, -math.inf),
]
ROWS = pytest.mark.parametrize("row", TABLE, ids=str)
TRIPLE = pytest.mark.parametrize("loss", [DPO(), CoolingWeighted(), ORPO()], ids=lambda loss: loss.name)


def sequences(pairs: list[Pair], dtype: torch.dtype) -> list[ck.SequenceLogprob]:
    """Chosen, rejected, and the reference's. The means are wrong on purpose: losses use totals and counts."""

    def side(total: str, count: str) -> ck.SequenceLogprob:
        totals = torch.tensor([getattr(pair, total) for pair in pairs], dtype=dtype)
        counts = torch.tensor([getattr(pair, count) for pair in pairs])
        return ck.SequenceLogprob(totals, torch.full_like(totals, math.nan), counts)

    sides = [side(each, f"n_{each}") for each in ("chosen", "rejected")]
    for each in sides:
        each.total.requires_grad_()
    return [*sides, side("ref_chosen", "n_chosen"), side("ref_rejected", "n_rejected")]


def evaluate(loss: ck.PreferenceLoss, pairs: list[Pair], dtype: torch.dtype, fused: bool = False) -> torch.Tensor:
    """Loss and gradients [P, 3]. `fused`: by `preference_loss`, one pair at a time."""
    chosen, rejected, *refs = sequences(pairs, dtype)
    refs = refs if loss.needs_reference else []
    if fused:
        sides = (chosen, rejected, *refs)
        one = [[ck.SequenceLogprob(*(x[i : i + 1] for x in side)) for side in sides] for i in range(len(pairs))]
        losses = torch.stack([ck.preference_loss(*arguments, loss=loss).loss for arguments in one])
    else:
        losses = loss(chosen, rejected, *refs).loss
    grads = torch.autograd.grad(losses.sum(), [chosen.total, rejected.total])
    return torch.stack([losses.detach(), *grads], dim=1)


def expected(row: Row, pairs: list[Pair]) -> torch.Tensor:
    return torch.tensor([row.value_and_gradient(pair) for pair in pairs], dtype=torch.float64)


def test_every_loss_has_a_row():
    assert {row.loss.name for row in TABLE} == set(ck.PREFERENCE_LOSSES)
    for name, kind in ck.PREFERENCE_LOSSES.items():
        assert kind.name == name
        assert kind().normalize in ("sequence", "token")
        assert "arXiv" in kind.__doc__


@ROWS
@pytest.mark.parametrize("fused", [False, True], ids=["per-pair", "mean"])
def test_values_and_gradients(row, fused):
    truth = expected(row, PAIRS)
    double = evaluate(row.loss, PAIRS, torch.float64, fused)
    torch.testing.assert_close(double, truth, rtol=1e-12, atol=1e-13)
    single = evaluate(row.loss, PAIRS[:5], torch.float32, fused)
    torch.testing.assert_close(single.double(), truth[:5], rtol=1e-5, atol=2e-6)


@ROWS
def test_huge_log_ratios(row):
    torch.testing.assert_close(evaluate(row.loss, HUGE, torch.float64), expected(row, HUGE), rtol=1e-12, atol=1e-30)
    single = evaluate(row.loss, HUGE[:2], torch.float32)
    torch.testing.assert_close(single.double(), expected(row, HUGE[:2]), rtol=1e-5, atol=1e-30)


@ROWS
def test_infinite_log_probs(row):
    """Values and gradients are the limits, infinite or not, and never NaN."""
    pairs = INFINITE if row.loss.needs_reference else INFINITE[:2]
    limits = [Pair(*(-LARGE if x == -math.inf else x for x in pair)) for pair in pairs]
    truth = expected(row, limits)
    for dtype in (torch.float64, torch.float32):
        found = evaluate(row.loss, pairs, dtype).double()
        torch.testing.assert_close(found, truth, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-30)


@ROWS
@pytest.mark.parametrize("fill", [0.0, -3.0, math.nan, -math.inf], ids=str)
def test_pairs_with_an_empty_answer_are_left_out(row, fill):
    empty = [Pair(0.0, -4.0, 0, 2, fill, -3.0), Pair(-4.0, 0.0, 2, 0, -3.0, fill), Pair(0.0, 0.0, 0, 0, fill, fill)]
    pairs = [*PAIRS[:2], *empty]
    chosen, rejected, *refs = sequences(pairs, torch.float64)
    refs = refs if row.loss.needs_reference else []
    out = ck.preference_loss(chosen, rejected, *refs, loss=row.loss)
    truth = expected(row, PAIRS[:2])
    assert out.kept.tolist() == [True, True, False, False, False]
    torch.testing.assert_close(out.loss, truth[:, 0].mean(), rtol=1e-12, atol=0)
    grads = torch.stack(torch.autograd.grad(out.loss, [chosen.total, rejected.total]), 1)
    torch.testing.assert_close(grads[:2], truth[:, 1:] / 2, rtol=1e-12, atol=1e-15)
    assert torch.equal(grads[2:], torch.zeros(3, 2, dtype=torch.float64))
    assert not out.chosen_logp.mean[2].item()
    per_pair = row.loss(chosen, rejected, *refs).loss
    assert per_pair[2:].tolist() == [0.0] * 3


@ROWS
def test_no_pair_left(row):
    chosen, rejected, *refs = sequences([Pair(0.0, -4.0, 0, 2), Pair(-4.0, 0.0, 2, 0)], torch.float32)
    out = ck.preference_loss(chosen, rejected, *(refs if row.loss.needs_reference else []), loss=row.loss)
    assert out.loss.item() == 0.0
    assert not torch.stack(torch.autograd.grad(out.loss, [chosen.total, rejected.total])).any()


@ROWS
def test_nan_stays_visible(row):
    found = evaluate(row.loss, [Pair(math.nan, -1.0), Pair(-1.0, math.nan)], torch.float32)
    if row.loss.name == "cwdpo" and row.loss.cooling.constant == 0:
        found = found[:1]
    assert found[:, 0].isnan().all()


@ROWS
def test_metrics(row):
    chosen, rejected, *refs = sequences(PAIRS, torch.float64)
    out = ck.preference_loss(chosen, rejected, *(refs if row.loss.needs_reference else []), loss=row.loss)
    ratios = [pair if row.loss.needs_reference else pair._replace(ref_chosen=0, ref_rejected=0) for pair in PAIRS]
    ratios = torch.tensor([pair.ratios(row.loss.normalize == "token") for pair in ratios], dtype=torch.float64)
    rewards = row.loss.beta * ratios
    torch.testing.assert_close(torch.stack([out.chosen_reward, out.rejected_reward], 1), rewards)
    torch.testing.assert_close(out.margin, rewards[:, 0] - rewards[:, 1])
    assert torch.equal(out.accuracy, (out.margin > 0).double())
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in (*out[1:6], *out.chosen_logp, *out.rejected_logp, out.kept))
    torch.testing.assert_close(out.rejected_logp.mean, rejected.total / rejected.count)
    if row.loss.name != "cwdpo":
        assert torch.equal(out.cooling_weight, torch.ones_like(out.margin))


@pytest.mark.parametrize("normalize", ["sequence", "token"])
@pytest.mark.parametrize("drop_below", [None, -4.0])
def test_the_plain_cooling_weighted_loss_is_the_fused_one(normalize, drop_below):
    loss = CoolingWeighted(0.3, ck.Cooling(-2.5, 0.7, drop_below=drop_below))
    chosen, rejected, *refs = sequences([*PAIRS, Pair(0.0, -4.0, 0, 2)], torch.float64)
    fused = ck.preference_loss(chosen, rejected, *refs, loss=loss, normalize=normalize)
    plain = loss(chosen, rejected, *refs, normalize=normalize)
    assert torch.equal(plain.kept, fused.kept)
    assert fused.kept.sum() == (5 if drop_below else 6)
    mean = plain.loss.sum() / plain.kept.sum()
    torch.testing.assert_close(mean, fused.loss, rtol=1e-13, atol=0)
    for a, b in zip(plain[1:6], fused[1:6], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    grads = (torch.autograd.grad(each, [chosen.total, rejected.total]) for each in (mean, fused.loss))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


def test_normalize_token_takes_means():
    """DPO on means is TRL's sigmoid_norm; IPO on sums is the equation as it is printed."""
    chosen, rejected, *refs = sequences(PAIRS, torch.float64)
    ratios = torch.tensor([[float(x) for x in pair.ratios(True)] for pair in PAIRS], dtype=torch.float64)
    found = DPO(0.3)(chosen, rejected, *refs, normalize="token").loss
    torch.testing.assert_close(found, -torch.nn.functional.logsigmoid(0.3 * (ratios[:, 0] - ratios[:, 1])))
    sums = torch.tensor([[float(x) for x in pair.ratios()] for pair in PAIRS], dtype=torch.float64)
    found = IPO(0.3)(chosen, rejected, *refs, normalize="sequence").loss
    torch.testing.assert_close(found, (sums[:, 0] - sums[:, 1] - 1 / 0.6) ** 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_orpo_of_a_certain_answer(dtype):
    """Odds are infinite. The loss of a certain chosen answer is 0, its gradient -(1 + beta p / (1 - p)) / n."""
    chosen, rejected = sequences([Pair(0.0, -3.0, 2, 3)], dtype)[:2]
    loss = ORPO(0.5)(chosen, rejected).loss
    by_chosen, by_rejected = torch.autograd.grad(loss.sum(), [chosen.total, rejected.total])
    odds = math.exp(-1) / (1 - math.exp(-1))
    assert loss.item() == pytest.approx(0.0, abs=1e-30)
    assert by_chosen.item() == pytest.approx(-(1 + 0.5 * odds) / 2, rel=1e-4)
    assert by_rejected.item() == pytest.approx(0.0, abs=1e-30)
    assert ORPO()(rejected, chosen).loss.item() == math.inf


@ROWS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_from_hidden_states(row, dtype):
    """Loss and gradients of hidden states and head, against full logits and the definition's gradients."""
    hidden, head, labels = make_inputs((6, 5), 41, 12, dtype, bias=True)
    labels[4] = -100  # an empty rejected answer
    refs = torch.tensor([[-9.0, -8.0, -7.0], [-6.0, -9.5, -8.0]], dtype=dtype)
    refs = refs if row.loss.needs_reference else []
    out = ck.linear_preference_loss(hidden, head, labels, *refs, loss=row.loss)
    hidden64, head64 = as_float64(hidden, head)
    logp = reference.sequence_logprob(reference.linear_logprob(hidden64, head64, labels), labels)
    totals, counts = logp.total.tolist(), logp.count.tolist()
    ref_totals = refs.tolist() if len(refs) else [[0.0] * 3] * 2
    pairs = [Pair(*totals[i::3], *counts[i::3], *(side[i] for side in ref_totals)) for i in (0, 2)]
    truth = expected(row, pairs)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    assert out.kept.tolist() == [True, False, True]
    assert out.loss.item() == pytest.approx(truth[:, 0].mean().item(), rel=tolerance)
    upstream = torch.zeros(6, dtype=torch.float64)
    upstream[[0, 2]], upstream[[3, 5]] = truth[:, 1] / 2, truth[:, 2] / 2
    grads = torch.autograd.grad(logp.total, leaves(hidden64, head64), upstream)
    for actual, right in zip(torch.autograd.grad(out.loss, leaves(hidden, head)), grads, strict=True):
        assert relative_error(actual, right) < tolerance


@TRIPLE
def test_packed_batches_and_rows(loss):
    hidden, head, labels = make_inputs((4, 5), 41, 12, torch.float64)
    refs = [torch.tensor([-9.0, -8.0]), torch.tensor([-7.0, -6.0])] if loss.needs_reference else []
    padded = ck.linear_preference_loss(hidden, head, labels, *refs, loss=loss)
    flat, flat_labels = hidden.reshape(20, 12), labels.reshape(20)
    options = {"loss": loss, "cu_seqlens": torch.arange(5) * 5}
    packed = ck.linear_preference_loss(flat, head, flat_labels, *refs, **options)
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-14, atol=0)
    rows = (flat_labels != -100).nonzero().squeeze(1)[:-1]
    fewer = ck.linear_preference_loss(flat, head, flat_labels, *refs, rows=rows, **options)
    assert fewer.rejected_logp.count.sum() == packed.rejected_logp.count.sum() - 1
    renamed = torch.where(labels == -100, 3, labels.where(labels != 3, 4))
    other = ck.linear_preference_loss(hidden, head, renamed, *refs, loss=loss, ignore_index=3)
    same = ck.linear_preference_loss(hidden, head, renamed.where(renamed != 3, -100), *refs, loss=loss)
    assert torch.equal(other.loss, same.loss)


def test_the_cooling_weighted_loss_is_one_fused_op(monkeypatch):
    calls = []

    def record(name: str) -> None:
        function = getattr(ck, name)
        monkeypatch.setattr(functional, name, lambda *args, **options: calls.append(name) or function(*args, **options))

    record("linear_cwdpo_loss")
    record("cwdpo_loss")
    hidden, head, labels = make_inputs((4, 5), 41, 12)
    refs = torch.full((2, 2), -8.0)
    loss = CoolingWeighted(0.2, ck.Cooling(-3.0, 0.5, drop_below=-20.0))
    out = ck.linear_preference_loss(hidden, head, labels, *refs, loss=loss, normalize="token")
    same = ck.linear_cwdpo_loss(hidden, head, labels, *refs, beta=0.2, cooling=loss.cooling, normalize="token")
    torch.testing.assert_close(out, same, rtol=0, atol=0)
    ck.preference_loss(out.chosen_logp, out.rejected_logp, *refs, loss=loss)
    assert calls == ["linear_cwdpo_loss", "cwdpo_loss"]


@ROWS
def test_torch_func_and_vmap(row):
    chosen, rejected, *refs = sequences(PAIRS[:5], torch.float64)
    refs = [ref.total for ref in refs] if row.loss.needs_reference else []

    def loss(w: torch.Tensor, l: torch.Tensor, *refs: torch.Tensor) -> torch.Tensor:  # noqa: E741
        sides = ck.SequenceLogprob(w, w, chosen.count), ck.SequenceLogprob(l, l, rejected.count)
        return ck.preference_loss(*sides, *refs, loss=row.loss).loss

    values = chosen.total.detach(), rejected.total.detach(), *refs
    truth = expected(row, PAIRS[:5])[:, 1:].T / 5
    torch.testing.assert_close(torch.stack(torch.func.grad(loss, (0, 1))(*values)), truth, rtol=1e-12, atol=1e-14)
    stacked = [torch.stack([value, 2 * value]) for value in values]
    batched = torch.func.vmap(loss)(*stacked)
    torch.testing.assert_close(batched, torch.stack([loss(*values), loss(*(2 * value for value in values))]))


def test_all_compile_without_graph_breaks():
    """In one graph, which is faster than a graph for each. tests/test_registration.py also compiles the backward."""
    hidden, head, labels = make_inputs((4, 3), 37, 8)
    refs = torch.full((2,), -6.0), torch.full((2,), -7.0)

    def losses(h: torch.Tensor) -> torch.Tensor:
        logp = ck.linear_sequence_logprob(h, head.weight, labels)
        halves = [ck.SequenceLogprob(*(x[part] for x in logp)) for part in (slice(0, 2), slice(2, 4))]
        outputs = [
            ck.preference_loss(*halves, *(refs if row.loss.needs_reference else ()), loss=row.loss) for row in TABLE
        ]
        return torch.stack([out.loss + out.margin.sum() for out in outputs])

    torch._dynamo.reset()
    found = losses(hidden), torch.compile(losses, fullgraph=True, backend="eager")(hidden)
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), hidden)[0] for each in found))


def test_half_precision_log_probs_are_computed_in_float32():
    chosen, rejected, *refs = sequences(PAIRS, torch.bfloat16)
    out = ck.preference_loss(chosen, rejected, *refs, loss=DPO())
    assert {out.loss.dtype, out.margin.dtype, out.chosen_logp.total.dtype} == {torch.float32}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(0.0), "DPO: expected beta to have value > 0, got 0.0"),
        (lambda: DPO(beta="0.1"), "DPO: expected beta to have type a number, got str"),
        (lambda: DPO(label_smoothing=0.5), r"DPO: expected label_smoothing to have value in \[0, 0.5\), got 0.5"),
        (lambda: Robust(label_smoothing=-0.1), r"Robust: expected label_smoothing to have value in \[0, .*, got -0.1"),
        (lambda: EXO(label_smoothing=0.0), r"EXO: expected label_smoothing to have value in \(0, 1\), got 0.0"),
        (lambda: EXO(label_smoothing=1), r"EXO: expected label_smoothing to have value in \(0, 1\), got 1"),
        (lambda: DiscoPOP(tau=0.0), "DiscoPOP: expected tau to have value > 0, got 0.0"),
        (lambda: SimPO(gamma=-1.0), "SimPO: expected gamma to have value finite and >= 0, got -1.0"),
        (lambda: SimPO(label_smoothing=True), "SimPO: expected label_smoothing to have type a number, got bool"),
        (lambda: CPO(alpha=math.inf), "CPO: expected alpha to have value finite and >= 0, got inf"),
        (lambda: CoolingWeighted(cooling=0.5), "CoolingWeighted: expected cooling to have type Cooling, got float"),
        (lambda: replace(Hinge(), beta=math.nan), "Hinge: expected beta to have value .*, got nan"),
    ],
)  # fmt: skip
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("op", ["preference_loss", "linear_preference_loss"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dpo"}, r"expected loss to have type PreferenceLoss, such as DPO\(beta=0.1\), got str"),
        ({"loss": DPO}, r"expected loss to have type PreferenceLoss, .* got the class DPO"),
        ({"refs": []}, r"expected ref_chosen to have type Tensor or SequenceLogprob \(DPO needs a reference\), got "),
        ({"refs": [], "loss": CoolingWeighted()}, r"expected ref_chosen to have type .*CoolingWeighted needs a "),
        ({"refs": [torch.zeros(2)]}, r"expected ref_rejected to have type Tensor or SequenceLogprob .* got NoneType"),
        ({"loss": SimPO()}, r"expected ref_chosen to have value None \(SimPO has no reference\), got Tensor"),
        ({"refs": [torch.zeros(3), torch.zeros(2)]}, r"expected ref_chosen to have shape \[2\] \(one per pair\), got "),
        ({"normalize": "mean"}, "expected normalize to have value 'sequence' or 'token', got 'mean'"),
    ],
)  # fmt: skip
def test_arguments_are_checked(op, change, message):
    hidden, head, labels = make_inputs((4, 3), 37, 8)
    options = {"loss": DPO(), "refs": [torch.zeros(2), torch.zeros(2)], **change}
    logp = ck.linear_sequence_logprob(hidden, head, labels)
    halves = [ck.SequenceLogprob(*(x[part] for x in logp)) for part in (slice(0, 2), slice(2, 4))]
    arguments = halves if op == "preference_loss" else (hidden, head, labels)
    with pytest.raises(ValueError, match=f"^{op}: {message}"):
        getattr(ck, op)(*arguments, *options.pop("refs"), **options)


def test_an_odd_batch_is_an_error_of_the_function_that_was_called():
    hidden, head, labels = make_inputs((3, 3), 37, 8)
    with pytest.raises(ValueError, match=r"^linear_preference_loss: expected labels to have number of sequences even"):
        ck.linear_preference_loss(hidden, head, labels, loss=SimPO())
    with pytest.raises(ValueError, match=r"^preference_loss: expected chosen to have type SequenceLogprob, got Tensor"):
        ck.preference_loss(torch.zeros(2), torch.zeros(2), loss=SimPO())


def test_a_loss_of_the_users_own():
    """A subclass works without registration, in eager and compiled code."""

    class Squared(preference.PreferenceLoss):
        name = "squared"

        def per_pair(self, pairs: preference.Pairs) -> torch.Tensor:
            return (self.beta * (pairs.chosen - pairs.rejected) - 1) ** 2

    chosen, rejected, *refs = sequences(PAIRS, torch.float64)
    out = ck.preference_loss(chosen, rejected, *refs, loss=Squared(0.2))
    ratios = torch.tensor([[float(x) for x in pair.ratios()] for pair in PAIRS], dtype=torch.float64)
    torch.testing.assert_close(out.loss, ((0.2 * (ratios[:, 0] - ratios[:, 1]) - 1) ** 2).mean())
    assert "squared" not in ck.PREFERENCE_LOSSES
