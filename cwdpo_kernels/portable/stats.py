r"""Statistics of a token's distribution, and their gradient, from sums over the vocabulary (see softmax_sums.py).

With p the probability of the label, s its odds, q_v = u_v / sum_exp the distribution of its competitors among
themselves, and h2(p) = -p log p - (1 - p) log(1 - p),

    log s = (max_logit - target) + log sum_exp      logp = -log(1 + s)       log(1 - p) = -log(1 + 1 / s)
    H(q) = log sum_exp - moment / sum_exp           entropy = h2(p) + (1 - p) H(q)
    logsumexp = target - logp                       sum p_v^2 = p^2 + (1 - p)^2 sum_sq / sum_exp^2

No formula subtracts nearly equal numbers, however confident the token. With r = p (log s - H(q)),

    d entropy / d z_y   = (1 - p) r                 d entropy / d z_v   = -(1 - p) q_v (log q_v + H(q) + r)
    d logp / d z_y      = 1 - p                     d logp / d z_v      = -(1 - p) q_v
    d logsumexp / d z_y = p                         d logsumexp / d z_v = (1 - p) q_v
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gradients import NEGLIGIBLE
from .tiles import compute_dtype


def stats_of(sums: Tensor, vocab: int) -> tuple[Tensor, ...]:
    """logp, entropy, top1_prob, is_top1, logsumexp, log_sum_sq_probs, mean_logit [N] of sums [6, N].

    All NaN (False) if a logit is NaN or +inf, or if all are -inf.
    """
    target, max_logit, sum_exp, _, sum_sq, sum_logit = sums
    log_odds, logp, log_other = _log_probs(sums)
    p, other = torch.exp(logp), torch.exp(log_other)
    entropy_of_label = torch.where(p == 0, 0.0, -p * logp)
    entropy_of_others = torch.where(other == 0, 0.0, other * (_entropy_of_others(sums) - log_other))
    top_other = other / _nonzero(sum_exp)
    log_sq_other = 2 * (log_other - torch.log(_nonzero(sum_exp))) + torch.log(sum_sq)
    unlikely = log_odds > 0
    logsumexp = torch.where(unlikely, (max_logit + torch.log(sum_exp)) - log_other, target - logp)
    broken = torch.isnan(logp)
    entropy = (entropy_of_label + entropy_of_others).clamp_min(0)
    top1_prob, is_top1 = torch.where(max_logit > target, top_other, p), (target >= max_logit) & ~broken
    log_sum_sq = torch.logaddexp(2 * logp, log_sq_other)
    mean_logit = (sum_logit / vocab).masked_fill(broken, torch.nan)  # the others are NaN where logp is
    return logp, entropy, top1_prob, is_top1, logsumexp, log_sum_sq, mean_logit


def gradient_factors(
    sums: Tensor, grad_logp: Tensor, grad_entropy: Tensor, grad_logsumexp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_target, exp_factor, log_factor [N] of the logits (see gradients.py), 0 where no gradient arrives."""
    sum_exp, moment = _nonzero(sums[2]), sums[3]
    log_odds, logp, _ = _log_probs(sums)
    p, other = torch.exp(logp), -torch.expm1(logp)
    # Without competitors, or if theirs has no probability left, log s may be -inf: 0 * -inf would be NaN.
    competes = (sums[2] != 0) & (other != 0)
    r = torch.where(competes & (p != 0), p * (log_odds - _entropy_of_others(sums)), 0.0)
    share = torch.where(competes, other / sum_exp, 0.0)
    grad_target = other * (grad_logp + grad_entropy * r) + grad_logsumexp * p
    exp_factor = share * (grad_logsumexp - grad_logp + grad_entropy * (moment / sum_exp - r))
    used = (grad_logp != 0) | (grad_entropy != 0) | (grad_logsumexp != 0)
    factors = (grad_target, exp_factor, share * -grad_entropy)
    return tuple(torch.where(used, factor, 0.0) for factor in factors)  # type: ignore[return-value]


def sums_of_nothing(hidden: Tensor) -> Tensor:
    """The sums [6, N] over no entry of a vocabulary."""
    sums = hidden.new_zeros(6, hidden.shape[0], dtype=compute_dtype(hidden.dtype))
    sums[1] = torch.finfo(sums.dtype).min
    return sums


def sums_relative_to(top: Tensor, sums: Tensor) -> Tensor:
    """sum_exp, moment and sum_sq [3, N] relative to `top` [N], which is at least max_logit.

    With d = max_logit - top: sum_exp e^d, (moment + d sum_exp) e^d and sum_sq e^2d.
    """
    _, max_logit, sum_exp, moment, sum_sq, _ = sums
    shift = (max_logit - top).clamp_min(-NEGLIGIBLE)
    decay = torch.exp(shift)
    return torch.stack([sum_exp * decay, (moment + shift * sum_exp) * decay, sum_sq * decay.square()])


def factors_relative_to(
    max_logit: Tensor, top: Tensor, exp_factor: Tensor, log_factor: Tensor
) -> tuple[Tensor, Tensor]:
    """exp_factor and log_factor [N] for u_v = exp(z_v - max_logit), given those for exp(z_v - top).

    With d = max_logit - top: exp(z_v - top) = e^d u_v, and z_v - top = (z_v - max_logit) + d.
    """
    shift = (max_logit - top).clamp_min(-NEGLIGIBLE)
    decay = torch.exp(shift)
    return decay * (exp_factor + log_factor * shift), decay * log_factor


def _log_probs(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log s, log p and log(1 - p). log p is NaN if a logit is NaN or +inf, or if all are -inf."""
    target, max_logit, sum_exp, *_ = sums
    log_odds = (max_logit - target) + torch.log(sum_exp)
    zero = torch.zeros_like(log_odds)
    logp = -torch.logaddexp(log_odds, zero)
    return log_odds, logp.masked_fill(target == torch.inf, torch.nan), -torch.logaddexp(-log_odds, zero)


def _entropy_of_others(sums: Tensor) -> Tensor:
    """H(q): the entropy of the competitors' distribution among themselves; 0 without competitors."""
    sum_exp = _nonzero(sums[2])
    return torch.log(sum_exp) - sums[3] / sum_exp


def _nonzero(sum_exp: Tensor) -> Tensor:
    """The sum, or 1 if there is none: without competitors (V = 1, or all of them at -inf) it is 0."""
    return torch.where(sum_exp == 0, 1.0, sum_exp)
