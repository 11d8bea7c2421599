"""Liger's fused linear DPO loss and ours, called with the same arguments and compared with float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cwdpo_kernels.compat.liger import (
    LOSSES,
    LigerFusedLinearDPOFunction,
    LigerFusedLinearDPOLoss,
    liger_fused_linear_dpo,
)
from cwdpo_kernels.preference import (
    BCO,
    DPO,
    EXO,
    NCA,
    SPPO,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    Pairs,
    PreferenceLoss,
    Robust,
)
from cwdpo_kernels.testing import relative_error

PAIRS, TOKENS, DIM, VOCAB, IGNORED = 3, 11, 33, 507, 42
SMOOTHING = {"exo_pair": 0.1, "robust": 0.2}


def make(dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Policy [hidden, weight, bias], targets, and a reference that is close to the policy."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * (0.5 if size[-1:] == (DIM,) else 1.0)

    values = [normal(2 * PAIRS, TOKENS, DIM), normal(VOCAB, DIM), normal(VOCAB)]
    reference = [(value + 0.3 * normal(*value.shape)).to(dtype) for value in values]
    target = torch.randint(0, VOCAB, (2 * PAIRS, TOKENS), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = IGNORED
    return [value.to(dtype).requires_grad_() for value in values], target, reference


def loss_of(options: dict) -> PreferenceLoss:
    """Liger's loss type in our catalog. tests/preference checks the catalog's formulas against the papers."""
    smoothing = {"label_smoothing": options["label_smoothing"]}
    kind, of_kind = {
        "sigmoid": (DPO, {}), "hinge": (Hinge, {}), "exo_pair": (EXO, smoothing), "nca_pair": (NCA, {}),
        "robust": (Robust, smoothing), "bco_pair": (BCO, {}), "sppo_hard": (SPPO, {}), "apo_zero": (APOZero, {}),
        "apo_down": (APODown, {}), "discopop": (DiscoPOP, {"tau": options["discopop_tau"]}),
    }[options["loss_type"]]  # fmt: skip
    return kind(beta=options["beta"], **of_kind)


def eager(policy: list[Tensor], target: Tensor, reference: list[Tensor] | None, options: dict) -> list[Tensor]:
    """Loss and metrics from full logits, in the inputs' dtype. `policy` and `reference` are (hidden, weight, bias)."""
    labeled = target != IGNORED

    def answers(model: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(*model)
        logp = logits.log_softmax(-1).gather(-1, target.where(labeled, 0)[..., None])[..., 0]
        logp = logp.where(labeled, 0.0)
        length = labeled.sum(-1).clamp_min(1) if options["average_log_prob"] else 1
        return logits, logp, logp.sum(-1) / length

    logits, token_logp, logp = answers(policy)
    ratio = logp - (0 if reference is None else answers(reference)[2])
    chosen, rejected = ratio.chunk(2)
    loss_type, beta = loss_of(options), options["beta"]
    losses = loss_type.per_pair(Pairs(chosen, rejected, chosen, rejected))  # the means are not used
    nll = -token_logp[:PAIRS].sum() / labeled[:PAIRS].sum().clamp_min(1) * options["compute_nll_loss"]
    loss = losses.sum() / PAIRS + options["alpha"] * nll
    means = [half.mean() for half in logits.chunk(2)]
    return [loss, *logp.chunk(2), *means, nll, beta * chosen, beta * rejected]


def choose(loss_type: str, **changed) -> dict:
    options = {"ignore_index": IGNORED, "beta": 0.3, "alpha": 0.7, "compute_nll_loss": True, "use_ref_model": True}
    options |= {"average_log_prob": False, "loss_type": loss_type, "discopop_tau": 0.5}
    return options | {"label_smoothing": SMOOTHING.get(loss_type, 0.0)} | changed


def check(policy, target, reference, options, tolerance: float, with_bias: bool = True) -> None:
    """Compare every value and gradient of ours with float64."""
    count = 3 if with_bias else 2
    hidden, weight, *bias = policy[:count]
    ref_hidden, ref_weight, *ref_bias = reference[:count]
    loss, metrics = LigerFusedLinearDPOLoss(**options)(
        weight, hidden, target, *(bias or [None]), ref_hidden, ref_weight, *ref_bias
    )
    found = torch.autograd.grad(2 * loss, policy[:count])
    copies = [x.detach().double().requires_grad_() for x in policy[:count]]
    frozen = [x.double() for x in reference[:count]] if options["use_ref_model"] else None
    truth = eager(copies, target, frozen, options)
    expected = torch.autograd.grad(2 * truth[0], copies)
    assert not any(metric.requires_grad for metric in metrics)
    precise = 1e-11 if loss.dtype == torch.float64 else 1e-5
    for name, a, b in zip(("loss", *metrics._fields), (loss, *metrics), truth, strict=True):
        assert a.shape == b.shape
        assert relative_error(a, b) < precise, name
    for name, a, b in zip(("hidden", "weight", "bias"), found, expected, strict=False):
        assert relative_error(a, b) < tolerance, name


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("use_ref_model", [True, False], ids=["reference", "alone"])
@pytest.mark.parametrize("full", [True, False], ids=["nll+bias", "plain"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 5e-6), (torch.bfloat16, 8e-3)], ids=str
)
def test_values_and_gradients(loss_type, average, use_ref_model, full, dtype, tolerance):
    policy, target, reference = make(dtype)
    # Without a reference, log-ratios are tens of nats. A small beta keeps the losses away from their asymptotes.
    beta = 0.3 if use_ref_model or average else 0.03
    options = choose(loss_type, average_log_prob=average, use_ref_model=use_ref_model, compute_nll_loss=full, beta=beta)
    check(policy, target, reference, options, tolerance, with_bias=full)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("empty", [[0, 4], list(range(2 * PAIRS))], ids=["some", "all"])
def test_answers_without_tokens_have_no_gradient(loss_type, average, empty):
    policy, target, reference = make(torch.float64)
    target[empty] = IGNORED
    options = choose(loss_type, average_log_prob=average)
    loss, _ = LigerFusedLinearDPOLoss(**options)(policy[1], policy[0], target, policy[2], *reference)
    assert loss.isfinite()
    assert not torch.autograd.grad(loss, policy[0])[0][empty].any()
    check(policy, target, reference, options, 1e-11)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize("use_ref_model", [True, False], ids=["reference", "alone"])
def test_only_the_import_changes(loss_type, average, use_ref_model):
    peer = pytest.importorskip("liger_kernel.chunked_loss")
    (hidden, weight, bias), target, reference = make(torch.float32)
    options = choose(loss_type, average_log_prob=average, use_ref_model=use_ref_model, beta=0.1)
    options["compute_nll_loss"] = use_ref_model
    arguments = (weight, hidden, target, bias, *(reference if use_ref_model else ()))
    results = []
    for cls in (peer.LigerFusedLinearDPOLoss, LigerFusedLinearDPOLoss):
        loss, metrics = cls(**options, compiled=False)(*arguments)
        results.append([loss, *metrics, *torch.autograd.grad(loss, [hidden, weight, bias])])
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-5)


def test_functions_have_ligers_argument_order():
    functional = pytest.importorskip("liger_kernel.chunked_loss.functional")
    (hidden, weight, bias), target, reference = make(torch.float32)
    options = (IGNORED, 0.2, True, False, True, True, 2, "robust", 0.1, 0.05, 0.5)
    theirs = functional.liger_fused_linear_dpo(hidden, weight, target, bias, *reference, *options)
    for apply in (liger_fused_linear_dpo, LigerFusedLinearDPOFunction.apply):
        loss, metrics = apply(hidden, weight, target, bias, *reference, *options)
        torch.testing.assert_close((loss, *metrics), (theirs[0], *theirs[1]), rtol=2e-4, atol=2e-5)


def test_the_reference_gets_no_gradient():
    (hidden, weight, bias), target, reference = make(torch.float32)
    trainable = [tensor.requires_grad_() for tensor in reference]
    loss, _ = LigerFusedLinearDPOLoss(ignore_index=IGNORED)(weight, hidden, target, bias, *trainable)
    loss.backward()
    assert [tensor.grad for tensor in trainable] == [None] * 3


def test_saved_tensors_are_smaller_than_the_vocabulary():
    """With a frozen head. A trainable head may keep tiles within its budget."""
    (hidden, weight, bias), target, reference = make(torch.float32)
    sizes = []

    def record(saved: Tensor) -> Tensor:
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(record, lambda saved: saved):
        LigerFusedLinearDPOLoss(ignore_index=IGNORED)(weight.detach(), hidden, target, bias.detach(), *reference)
    assert max(sizes) == int((target != IGNORED).sum()) * DIM


def test_discopop_far_from_the_reference():
    """At d = -200, exp(-d) alone would be infinite, and 0 times infinity NaN."""
    hidden = torch.tensor([2000.0, 50.0]).view(2, 1, 1).requires_grad_()
    weight, target = torch.tensor([[0.0], [1.0]]), torch.tensor([[0], [1]])
    loss, _ = LigerFusedLinearDPOLoss(loss_type="discopop", use_ref_model=False)(weight, hidden, target)
    assert loss.item() == pytest.approx(200.0)
    assert torch.autograd.grad(loss, hidden)[0].flatten().tolist() == pytest.approx([0.1, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ipo"}, "Unsupported loss_type: expected one of sigmoid, .* discopop, got 'ipo'"),
        ({"loss_type": "simpo"}, "Unsupported loss_type: .* got 'simpo'"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be > 0 for loss_type='exo_pair' .* got 0.0"),
        ({"loss_type": "exo_pair", "label_smoothing": 1.0}, r"label_smoothing .* \(and < 1\), got 1.0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must lie in \[0.0, 0.5\) .* got 0.5"),
        ({"loss_type": "robust", "label_smoothing": -0.1}, r"label_smoothing must lie in \[0.0, 0.5\) .* got -0.1"),
        ({"beta": 0.0}, "expected beta to have a value > 0, got 0.0"),
        ({"discopop_tau": 0.0}, "expected discopop_tau to have a value > 0, got 0.0"),
    ],
    ids=["ipo", "unknown", "exo", "exo-one", "robust", "robust-negative", "beta", "tau"],
)
def test_unsupported_options(options, message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearDPOLoss(**options)


@pytest.mark.parametrize("rows", [0, 5])
def test_odd_and_empty_batches_raise(rows):
    (hidden, weight, _), target, _ = make(torch.float32)
    message = rf"expected target to have shape \[2P, T\], an even number of rows: .* got \[{rows}, {TOKENS}\]"
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearDPOLoss(use_ref_model=False)(weight, hidden[:rows], target[:rows])


@pytest.mark.parametrize("missing", ["ref_input", "ref_weight"])
def test_a_missing_reference_raises(missing):
    (hidden, weight, _), target, (ref_input, ref_weight, _) = make(torch.float32)
    reference = {"ref_input": ref_input, "ref_weight": ref_weight} | {missing: None}
    message = rf"expected {missing} to have type Tensor \(as use_ref_model is True\), got NoneType"
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearDPOLoss(ignore_index=IGNORED)(weight, hidden, target, **reference)
