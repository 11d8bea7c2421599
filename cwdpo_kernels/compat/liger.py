"""Liger's fused linear DPO loss (liger-kernel 0.8), for any device, with logits never rounded below float32.

Before:

    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

After:

    from cwdpo_kernels.compat.liger import LigerFusedLinearDPOLoss
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import IGNORE_INDEX, PREFERENCE_LOSSES, Head, PreferenceLoss, linear_sequence_logprob
from ..preference import Pairs
from ..validation import INDEX_DTYPES, check_dtype, check_number, check_positive, expect, fail

OP = "LigerFusedLinearDPOLoss"


class DPOMetrics(NamedTuple):
    """What the loss returns besides the scalar, in Liger's order, detached: [P] per pair, or a scalar per batch.

    Log-probs are in nats (per token with `average_log_prob`). Mean logits average all positions, including ignored
    ones. `nll_loss` is the chosen answers' NLL in nats per labeled token (0 without `compute_nll_loss`). Rewards are
    beta * (policy - reference log-prob).
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_logits_mean: Tensor
    rejected_logits_mean: Tensor
    nll_loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


# Liger's loss types.
LOSSES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip


class LigerFusedLinearDPOLoss(torch.nn.Module):
    """mean over pairs of a preference loss of log-ratios, plus alpha * NLL(chosen), from hidden states.

        d = beta * ((log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l)));  "sigmoid": -log sigmoid(d)

    loss_type: one of `LOSSES`, which `cwdpo_kernels.preference` computes.
    average_log_prob: use means over an answer's tokens instead of sums.
    use_ref_model: False sets log ref = 0 and ignores the reference's arguments.
    label_smoothing: used by "exo_pair" and "robust".
    discopop_tau: used by "discopop".
    compiled, chunk_size: accepted for compatibility; they tune Liger's chunking and have no effect here.

    An answer without labeled tokens has log-prob 0 (sum and mean) and no gradient, and the NLL of no token is 0. In
    Liger the mean of no token is NaN, and so is any loss without labeled chosen tokens.

    ValueError: an unknown loss type (also "ipo"), smoothing outside a loss's range, an odd batch, a missing reference.
    """

    def __init__(
        self, ignore_index: int = IGNORE_INDEX, beta: float = 0.1, alpha: float = 1.0, compute_nll_loss: bool = False,
        compiled: bool = True, use_ref_model: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
        loss_type: str = "sigmoid", label_smoothing: float = 0.0, discopop_tau: float = 0.05,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_options(loss_type, beta, label_smoothing, discopop_tau)
        check_number(OP, "alpha", alpha, "finite")
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, DPOMetrics]:  # fmt: skip
        """(loss, metrics) of _input [2P, T, D] (P chosen rows, then P rejected), lin_weight [V, D], bias [V], and
        aligned target [2P, T].

        ref_input, ref_weight and ref_bias are the reference's; its hidden size may differ, and it gets no gradient.
        Results are float32 (float64 for float64).
        """
        check_dtype(OP, "target", target, INDEX_DTYPES)
        shape = list(target.shape)
        ok = len(shape) == 2 and shape[0] > 0 and shape[0] % 2 == 0
        expect(ok, OP, "target", "shape", "[2P, T], an even number of rows: chosen first, rejected second", shape)
        pairs = shape[0] // 2
        policy = linear_sequence_logprob(_input, Head(lin_weight, bias), target, ignore_index=self.ignore_index)
        logp = policy.mean if self.average_log_prob else policy.total
        logratio = logp - self._reference_logp(target, ref_input, ref_weight, ref_bias)
        chosen, rejected = logratio.split(pairs)
        preference = _preference_loss(self.loss_type, self.beta, self.label_smoothing, self.discopop_tau)
        loss = preference.per_pair(Pairs(chosen, rejected, *policy.mean.split(pairs))).mean()
        nll = torch.zeros_like(loss)
        if self.compute_nll_loss:
            nll = -policy.total[:pairs].sum() / policy.count[:pairs].sum().clamp_min(1)
            loss = loss + self.alpha * nll
        chosen_logp, rejected_logp = logp.split(pairs)
        chosen_mean, rejected_mean = _mean_logits(_input, lin_weight, bias)
        rewards = self.beta * chosen, self.beta * rejected
        metrics = DPOMetrics(chosen_logp, rejected_logp, chosen_mean, rejected_mean, nll, *rewards)
        return loss, DPOMetrics(*(metric.detach() for metric in metrics))

    def _reference_logp(
        self, target: Tensor, ref_input: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
    ) -> Tensor | float:
        """The reference's log-probs [2P], 0 without a reference."""
        if not self.use_ref_model:
            return 0.0
        hidden, weight = _required("ref_input", ref_input), _required("ref_weight", ref_weight)
        with torch.no_grad():  # as a decorator of the method it would not compile
            logp = linear_sequence_logprob(hidden, Head(weight, ref_bias), target, ignore_index=self.ignore_index)
        return logp.mean if self.average_log_prob else logp.total


def liger_fused_linear_dpo(
    _input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None, ref_bias: Tensor | None = None, ignore_index: int = IGNORE_INDEX,
    beta: float = 0.1, compute_nll_loss: bool = False, compiled: bool = True, use_ref_model: bool = True,
    average_log_prob: bool = False, chunk_size: int = 1, loss_type: str = "sigmoid", label_smoothing: float = 0.0,
    discopop_tau: float = 0.05, alpha: float = 1.0,
) -> tuple[Tensor, DPOMetrics]:  # fmt: skip
    """`LigerFusedLinearDPOLoss` as a function, with the argument order of Liger's functional."""
    loss = LigerFusedLinearDPOLoss(
        ignore_index, beta, alpha, compute_nll_loss, compiled, use_ref_model, average_log_prob, chunk_size, loss_type,
        label_smoothing, discopop_tau,
    )  # fmt: skip
    return loss(weight, _input, target, bias, ref_input, ref_weight, ref_bias)


class LigerFusedLinearDPOFunction:
    """Liger's name for the function. Callers use only `apply`."""

    apply = staticmethod(liger_fused_linear_dpo)


def _check_options(loss_type: str, beta: float, label_smoothing: float, discopop_tau: float) -> None:
    """Check the options. The first three errors begin like Liger's, because callers match them."""
    if loss_type not in LOSSES:
        raise ValueError(f"{OP}: Unsupported loss_type: expected one of {', '.join(LOSSES)}, got {loss_type!r}")
    check_number(OP, "label_smoothing", label_smoothing, "a finite number")
    if loss_type == "exo_pair" and not 0 < label_smoothing < 1:
        raise ValueError(f"{OP}: label_smoothing must be > 0 for loss_type='exo_pair' (and < 1), got {label_smoothing}")
    if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"{OP}: label_smoothing must lie in [0.0, 0.5) for loss_type='robust', got {label_smoothing}")
    check_positive(OP, "beta", beta, "a value")
    check_positive(OP, "discopop_tau", discopop_tau, "a value")


def _preference_loss(loss_type: str, beta: float, label_smoothing: float, discopop_tau: float) -> PreferenceLoss:
    """The loss of Liger's name, with those of the options that Liger uses for it."""
    options = {"beta": beta}
    if loss_type in ("exo_pair", "robust"):
        options["label_smoothing"] = label_smoothing
    if loss_type == "discopop":
        options["tau"] = discopop_tau
    return PREFERENCE_LOSSES[loss_type](**options)


def _required(name: str, value: Tensor | None) -> Tensor:
    """An argument that a loss with a reference needs."""
    if not isinstance(value, Tensor):
        fail(OP, name, "type", "Tensor (as use_ref_model is True)", type(value).__name__)
    return value


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[2]: the mean logit of the chosen rows and of the rejected rows, over positions and vocabulary.

    mean(z) = mean(hidden) . mean(weight) + mean(bias), which needs no logits.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    halves = hidden.reshape(2, -1, hidden.shape[-1]).mean(1, dtype=dtype)
    # Sum in blocks: torch's half-precision sum on a CPU first copies its input to float32.
    mean_row = sum(rows.sum(0, dtype=dtype) for rows in weight.split(4096)) / weight.shape[0]
    means = (halves * mean_row).sum(-1)
    return means if bias is None else means + bias.mean(dtype=dtype)
