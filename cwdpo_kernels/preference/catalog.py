"""The preference losses, each with its formula and paper.

D_w and D_l are the fields `chosen` and `rejected` of `Pairs`, in nats: log-ratios to the reference, or the policy's
log-probs for a loss without a reference. w = beta D_w, l = beta D_l and d = beta (D_w - D_l). sigma is the logistic
function. Losses are in nats, except those of Hinge, IPO, SPPO and APO. Defaults are those of the papers or of TRL,
whose names the registry uses.

To add a loss, write its class here, name it in `PREFERENCE_LOSSES`, and add a row to
tests/preference/definitions.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import validation as check
from ..losses import cooling_weight
from ..types import Cooling
from .base import Pairs, PreferenceLoss


@dataclass(frozen=True)
class CoolingWeighted(PreferenceLoss):
    """CW-DPO: -log sigma(beta (D_w - w_c D_l)), w_c = `cooling_weight` of the rejected answer, without gradient.

    Pairs below `cooling.drop_below` are left out. `preference_loss` and `linear_preference_loss` run it as the fused
    `cwdpo_loss`. CW-DPO, arXiv 2510.11978.
    """

    name = "cwdpo"
    cooling: Cooling = field(default_factory=Cooling)

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = type(self.cooling).__name__
        check.expect(isinstance(self.cooling, Cooling), "CoolingWeighted", "cooling", "type", "Cooling", kind)

    def per_pair(self, pairs: Pairs) -> Tensor:
        weight, rejected = self.rejected_weight(pairs), pairs.rejected
        # A weight of 0 leaves out an impossible negative (0 * -inf), but not NaN.
        cooled = torch.where((weight == 0) & torch.isinf(rejected), 0.0, weight * rejected)
        return -logsigmoid(self.beta * (pairs.chosen - cooled))

    def rejected_weight(self, pairs: Pairs) -> Tensor:
        return cooling_weight(pairs.rejected_mean, self.cooling)

    def keeps(self, pairs: Pairs) -> Tensor:
        low = self.cooling.drop_below
        return super().keeps(pairs) if low is None else ~(pairs.rejected_mean < low)  # keeps NaN


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    """-(1 - e) log sigma(d) - e log sigma(-d), e = `label_smoothing`.

    e = 0: DPO, arXiv 2305.18290, equation 7. e > 0, the share of pairs that are labeled the wrong way round:
    conservative DPO, note by E. Mitchell (2023). With normalize="token" it is TRL's "sigmoid_norm".

    label_smoothing: in [0, 0.5).
    """

    name = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_smoothing(self, self.label_smoothing)

    def per_pair(self, pairs: Pairs) -> Tensor:
        return _smoothed(self.beta * (pairs.chosen - pairs.rejected), self.label_smoothing)


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """max(0, 1 - d): SLiC-HF, arXiv 2305.10425, with the log-ratios of RSO, arXiv 2309.06657."""

    name = "hinge"

    def per_pair(self, pairs: Pairs) -> Tensor:
        return torch.relu(1 - self.beta * (pairs.chosen - pairs.rejected))


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """(D_w - D_l - 1 / (2 beta))^2, in nats^2: IPO, arXiv 2310.12036, equation 17, where beta is tau.

    D are means over tokens, as in TRL; normalize="sequence" takes sums, as the equation is printed.
    """

    name = "ipo"
    normalize = "token"

    def per_pair(self, pairs: Pairs) -> Tensor:
        return (pairs.chosen - pairs.rejected - 0.5 / self.beta) ** 2


@dataclass(frozen=True)
class Robust(PreferenceLoss):
    """(-(1 - e) log sigma(d) + e log sigma(-d)) / (1 - 2 e): robust DPO, arXiv 2403.00409.

    Its mean over labels that are flipped with probability e is DPO's loss on the right labels.

    label_smoothing: e, in [0, 0.5).
    """

    name = "robust"
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_smoothing(self, self.label_smoothing)

    def per_pair(self, pairs: Pairs) -> Tensor:
        smoothing = self.label_smoothing
        d = self.beta * (pairs.chosen - pairs.rejected)
        if not smoothing:  # 0 * log sigma(-inf) would be NaN
            return -logsigmoid(d)
        return (smoothing * logsigmoid(-d) - (1 - smoothing) * logsigmoid(d)) / (1 - 2 * smoothing)


@dataclass(frozen=True)
class EXO(PreferenceLoss):
    """KL(q || p) of q = (sigma(d), sigma(-d)) and p = (1 - e, e): EXO, arXiv 2402.00856, equation 16.

    label_smoothing: e, in (0, 1).
    """

    name = "exo_pair"
    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check.check_number("EXO", "label_smoothing", self.label_smoothing, "in (0, 1)", low=0, high=1)
        check.expect(0 < self.label_smoothing < 1, "EXO", "label_smoothing", "value", "in (0, 1)", self.label_smoothing)

    def per_pair(self, pairs: Pairs) -> Tensor:
        d = self.beta * (pairs.chosen - pairs.rejected)
        # q log q -> 0 as q -> 0, but 0 * inf is NaN. Infinite d have the limit's value and gradient 0.
        largest = torch.finfo(d.dtype).max
        d = d.clamp(-largest, largest)
        chosen = torch.sigmoid(d) * (logsigmoid(d) - math.log1p(-self.label_smoothing))
        return chosen + torch.sigmoid(-d) * (logsigmoid(-d) - math.log(self.label_smoothing))


@dataclass(frozen=True)
class NCA(PreferenceLoss):
    """-log sigma(w) - (log sigma(-w) + log sigma(-l)) / 2: NCA, arXiv 2402.05369."""

    name = "nca_pair"

    def per_pair(self, pairs: Pairs) -> Tensor:
        w, l = self.beta * pairs.chosen, self.beta * pairs.rejected  # noqa: E741
        return -logsigmoid(w) - 0.5 * (logsigmoid(-w) + logsigmoid(-l))


@dataclass(frozen=True)
class BCO(PreferenceLoss):
    """-log sigma(w) - log sigma(-l): BCO, arXiv 2404.04656, without its reward shift, as in TRL's "bco_pair"."""

    name = "bco_pair"

    def per_pair(self, pairs: Pairs) -> Tensor:
        return -logsigmoid(self.beta * pairs.chosen) - logsigmoid(-self.beta * pairs.rejected)


@dataclass(frozen=True)
class SPPO(PreferenceLoss):
    """(D_w - 1 / (2 beta))^2 + (D_l + 1 / (2 beta))^2, in nats^2: SPPO, arXiv 2405.00675, equation 4.7.

    With the hard probabilities 1 of the chosen and 0 of the rejected answer. beta is 1 / eta.
    """

    name = "sppo_hard"

    def per_pair(self, pairs: Pairs) -> Tensor:
        half = 0.5 / self.beta
        return (pairs.chosen - half) ** 2 + (pairs.rejected + half) ** 2


@dataclass(frozen=True)
class APOZero(PreferenceLoss):
    """1 - sigma(w) + sigma(l): APO-zero, arXiv 2408.06266, equation 7. For chosen answers better than the model's."""

    name = "apo_zero"

    def per_pair(self, pairs: Pairs) -> Tensor:
        return torch.sigmoid(-self.beta * pairs.chosen) + torch.sigmoid(self.beta * pairs.rejected)


@dataclass(frozen=True)
class APODown(PreferenceLoss):
    """sigma(w) + 1 - sigma(d): APO-down, arXiv 2408.06266, equation 8. For chosen answers worse than the model's."""

    name = "apo_down"

    def per_pair(self, pairs: Pairs) -> Tensor:
        return torch.sigmoid(self.beta * pairs.chosen) + torch.sigmoid(-self.beta * (pairs.chosen - pairs.rejected))


@dataclass(frozen=True)
class DiscoPOP(PreferenceLoss):
    """-(1 - m) log sigma(d) + m exp(-d), m = sigma(d / tau): DiscoPOP, arXiv 2406.08414, equation 5.

    tau: > 0. The paper's is 0.05.
    """

    name = "discopop"
    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check.check_positive("DiscoPOP", "tau", self.tau)

    def per_pair(self, pairs: Pairs) -> Tensor:
        d = self.beta * (pairs.chosen - pairs.rejected)
        finite = torch.where(torch.isinf(d), 0.0, d)
        # m exp(-d) as one exponential: its factors can be 0 and infinite. At d = -100 it is exp(100 - 100 / tau).
        blend = torch.sigmoid(-finite / self.tau) * -logsigmoid(finite)
        blend = blend + torch.exp(logsigmoid(finite / self.tau) - finite)
        return torch.where(torch.isinf(d), -logsigmoid(d), blend)


@dataclass(frozen=True)
class SimPO(PreferenceLoss):
    """DPO's loss of d - gamma, where D are mean log-probs of the policy: SimPO, arXiv 2405.14734, equation 6.

    No reference. beta is per nat per token; the paper takes 2 to 2.5, and gamma of 0.3 to 1.6.

    gamma: the target margin, >= 0. label_smoothing: as in `DPO`.
    """

    name = "simpo"
    needs_reference = False
    normalize = "token"
    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check.check_number("SimPO", "gamma", self.gamma, "finite and >= 0", low=0)
        _check_smoothing(self, self.label_smoothing)

    def per_pair(self, pairs: Pairs) -> Tensor:
        return _smoothed(self.beta * (pairs.chosen - pairs.rejected) - self.gamma, self.label_smoothing)


@dataclass(frozen=True)
class CPO(PreferenceLoss):
    """DPO's loss of d, where D are log-probs of the policy, + alpha * NLL(chosen): CPO, arXiv 2401.08417, equation 3.

    No reference. NLL is the chosen answer's, in nats per token.

    alpha: weight of the NLL, >= 0. label_smoothing: as in `DPO`.
    """

    name = "cpo"
    needs_reference = False
    alpha: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check.check_number("CPO", "alpha", self.alpha, "finite and >= 0", low=0)
        _check_smoothing(self, self.label_smoothing)

    def per_pair(self, pairs: Pairs) -> Tensor:
        preference = _smoothed(self.beta * (pairs.chosen - pairs.rejected), self.label_smoothing)
        return preference - self.alpha * pairs.chosen_mean if self.alpha else preference


@dataclass(frozen=True)
class ORPO(PreferenceLoss):
    """NLL(chosen) - beta log sigma(log odds(chosen) - log odds(rejected)): ORPO, arXiv 2403.07691, equations 6 and 7.

    No reference. odds(y) = p / (1 - p) of p = exp(mean log-prob); NLL is in nats per token. beta is lambda of the
    paper.
    """

    name = "orpo"
    needs_reference = False
    normalize = "token"

    def per_pair(self, pairs: Pairs) -> Tensor:
        # 1 / odds = exp(nll) - 1. The derivative of its logarithm is infinite at 0, though that of the loss is finite:
        # an NLL below `least` (of a certain answer) counts as `least`.
        nll, number = -pairs.chosen, torch.finfo(pairs.chosen.dtype)
        least = number.tiny / number.eps
        log_odds_ratio = _log_expm1(-pairs.rejected) - _log_expm1(nll + torch.relu(least - nll).detach())
        return nll - self.beta * logsigmoid(log_odds_ratio)


def _smoothed(d: Tensor, smoothing: float) -> Tensor:
    """-(1 - smoothing) log sigma(d) - smoothing log sigma(-d)."""
    if not smoothing:  # 0 * log sigma(-inf) would be NaN
        return -logsigmoid(d)
    return -(1 - smoothing) * logsigmoid(d) - smoothing * logsigmoid(-d)


def _log_expm1(x: Tensor) -> Tensor:
    """log(exp(x) - 1) for x >= 0."""
    return x + torch.log(-torch.expm1(-x))


def _check_smoothing(loss: PreferenceLoss, smoothing: float) -> None:
    op = type(loss).__name__
    check.check_number(op, "label_smoothing", smoothing, "in [0, 0.5)", low=0, high=0.5)
    check.expect(smoothing < 0.5, op, "label_smoothing", "value", "in [0, 0.5)", smoothing)


_ALL: tuple[type[PreferenceLoss], ...] = (
    CoolingWeighted, DPO, Hinge, IPO, Robust, EXO, NCA, BCO, SPPO, APOZero, APODown, DiscoPOP, SimPO, CPO, ORPO,
)  # fmt: skip
PREFERENCE_LOSSES: dict[str, type[PreferenceLoss]] = {loss.name: loss for loss in _ALL}
