"""The table of the preference losses: options to test, and the loss of a pair by its definition, in 60 digits.

A new loss gets a row in `TABLE`. Its definition is written from the paper, for one pair of mpmath numbers, without
regard to overflow: mpmath has none. Gradients are numeric derivatives of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mpmath as mp
from mpmath import exp, expm1, log

from cwdpo_kernels import Cooling
from cwdpo_kernels.preference import (
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    NCA,
    ORPO,
    SPPO,
    APODown,
    APOZero,
    CoolingWeighted,
    DiscoPOP,
    Hinge,
    PreferenceLoss,
    Robust,
    SimPO,
)

mp.mp.dps = 60
LARGE = mp.mpf("1e200")  # stands for infinity


class Pair(NamedTuple):
    """Total log-probs of the chosen and the rejected answer, their lengths, and the reference's total log-probs."""

    chosen: Any
    rejected: Any
    n_chosen: int = 1
    n_rejected: int = 1
    ref_chosen: Any = 0
    ref_rejected: Any = 0

    def ratios(self, per_token: bool = False) -> tuple[Any, Any]:
        """D_w, D_l of sums, or of means."""
        w, l = self.chosen - self.ref_chosen, self.rejected - self.ref_rejected  # noqa: E741
        return (w / self.n_chosen, l / self.n_rejected) if per_token else (w, l)

    def means(self) -> tuple[Any, Any]:
        return self.chosen / self.n_chosen, self.rejected / self.n_rejected


def s(x: Any) -> Any:
    return 1 / (1 + exp(-x))


def cooled(p: Pair, o: CoolingWeighted, fixed: Pair) -> Any:
    """The weight is a constant for the gradient: it comes from `fixed`, which equals `p` at the point."""
    (w, l), cooling = p.ratios(), o.cooling  # noqa: E741
    weight = cooling.constant
    if weight is None:
        weight = s((fixed.means()[1] - cooling.logp_floor) / cooling.temperature)
    return -log(s(o.beta * (w - weight * l)))


def smoothed(d: Any, e: float) -> Any:
    return -(1 - mp.mpf(e)) * log(s(d)) - (e * log(s(-d)) if e else 0)


def difference(p: Pair, o: PreferenceLoss, per_token: bool = False) -> Any:
    w, l = p.ratios(per_token)  # noqa: E741
    return o.beta * (w - l)


def rewards(p: Pair, o: PreferenceLoss) -> tuple[Any, Any]:
    w, l = p.ratios()  # noqa: E741
    return o.beta * w, o.beta * l


def exo(p: Pair, o: EXO) -> Any:
    d, e = difference(p, o), mp.mpf(o.label_smoothing)
    return s(d) * log(s(d) / (1 - e)) + s(-d) * log(s(-d) / e)


def nca(p: Pair, o: NCA) -> Any:
    w, l = rewards(p, o)  # noqa: E741
    return -log(s(w)) - log(s(-w)) / 2 - log(s(-l)) / 2


def bco(p: Pair, o: BCO) -> Any:
    w, l = rewards(p, o)  # noqa: E741
    return -log(s(w) * s(-l))


def sppo(p: Pair, o: SPPO) -> Any:
    (w, l), eta = p.ratios(), 1 / mp.mpf(o.beta)  # noqa: E741
    return (w - eta / 2) ** 2 + (l + eta / 2) ** 2


def apo_zero(p: Pair, o: APOZero) -> Any:
    w, l = rewards(p, o)  # noqa: E741
    return s(-w) + s(l)


def apo_down(p: Pair, o: APODown) -> Any:
    w, l = rewards(p, o)  # noqa: E741
    return s(w) + s(l - w)


def robust(p: Pair, o: Robust) -> Any:
    d, e = difference(p, o), mp.mpf(o.label_smoothing)
    return ((1 - e) * -log(s(d)) - (e * -log(s(-d)) if e else 0)) / (1 - 2 * e)


def discopop(p: Pair, o: DiscoPOP) -> Any:
    d = difference(p, o)
    return s(-d / o.tau) * log(1 + exp(-d)) + s(d / o.tau) * exp(-d)


def simpo(p: Pair, o: SimPO) -> Any:
    w, l = p.means()  # noqa: E741
    return smoothed(o.beta * w - o.beta * l - o.gamma, o.label_smoothing)


def cpo(p: Pair, o: CPO) -> Any:
    return smoothed(o.beta * (p.chosen - p.rejected), o.label_smoothing) - o.alpha * p.means()[0]


def orpo(p: Pair, o: ORPO) -> Any:
    w, l = p.means()  # noqa: E741
    odds_ratio = expm1(-l) / expm1(-w)  # odds(p) = p / (1 - p) = 1 / (1 / p - 1)
    return -w + o.beta * log(1 + 1 / odds_ratio)


@dataclass(frozen=True)
class Row:
    """A loss and its definition, called as `definition(pair, loss)`, or with the fixed pair if `has_constants`."""

    loss: PreferenceLoss
    definition: Callable[..., Any]
    has_constants: bool = False

    def __str__(self) -> str:
        options = [f"{key}={value}" for key, value in vars(self.loss).items() if key not in ("beta", "cooling")]
        if isinstance(self.loss, CoolingWeighted):
            options = ["adaptive" if self.loss.cooling.constant is None else "constant"]
        return "-".join([self.loss.name, *options])

    @functools.cache  # noqa: B019
    def value_and_gradient(self, pair: Pair) -> tuple[float, float, float]:
        """The loss, and its derivatives by the policy's totals. `LARGE` numbers are replaced by infinity."""
        pair = Pair(*(mp.mpf(value) for value in pair))

        def at(chosen: Any, rejected: Any) -> Any:
            moved = pair._replace(chosen=chosen, rejected=rejected)
            return self.definition(moved, self.loss, *([pair] if self.has_constants else []))

        with mp.workdps(60 if max(map(abs, pair)) < 1e3 else 500):
            value = at(pair.chosen, pair.rejected)
            by_chosen = mp.diff(lambda x: at(x, pair.rejected), pair.chosen)
            by_rejected = mp.diff(lambda x: at(pair.chosen, x), pair.rejected)
        return tuple(
            float(x if abs(x) < LARGE / mp.mpf("1e50") else mp.inf * mp.sign(x))
            for x in (value, by_chosen, by_rejected)
        )


def _float(x: Any) -> float:
    return float(x if abs(x) < LARGE / mp.mpf("1e50") else mp.inf * mp.sign(x))


TABLE = [
    Row(CoolingWeighted(0.3, Cooling(-2.5, 0.7)), cooled, has_constants=True),
    Row(CoolingWeighted(0.3, Cooling(constant=0.4)), cooled, has_constants=True),
    Row(DPO(0.3), lambda p, o: -log(s(difference(p, o)))),
    Row(DPO(0.3, label_smoothing=0.2), lambda p, o: smoothed(difference(p, o), 0.2)),
    Row(Hinge(0.3), lambda p, o: max(0, 1 - difference(p, o))),
    Row(IPO(0.3), lambda p, o: (difference(p, o, per_token=True) / o.beta - 1 / (2 * mp.mpf(o.beta))) ** 2),
    Row(Robust(0.3), robust),
    Row(Robust(0.3, label_smoothing=0.0), robust),
    Row(EXO(0.3), exo),
    Row(EXO(0.3, label_smoothing=0.3), exo),
    Row(NCA(0.3), nca),
    Row(BCO(0.3), bco),
    Row(SPPO(0.3), sppo),
    Row(APOZero(0.3), apo_zero),
    Row(APODown(0.3), apo_down),
    Row(DiscoPOP(0.3), discopop),
    Row(DiscoPOP(0.3, tau=0.5), discopop),
    Row(SimPO(), simpo),
    Row(SimPO(1.5, gamma=0.4, label_smoothing=0.1), simpo),
    Row(CPO(0.3), cpo),
    Row(CPO(0.3, alpha=0.0, label_smoothing=0.1), cpo),
    Row(ORPO(), orpo),
    Row(ORPO(0.7), orpo),
]
