"""Roofline model: the floating-point operations and bytes that each op needs, and the time limit that follows.

Legend: N labeled tokens, D hidden, V vocabulary, `itemsize` bytes per entry of hidden, weight or logits. "1G" is one
product of the tokens with the head, 2 N D V operations. Bytes count each necessary transfer from or to memory once.
Repeated reads, such as GEMM operands that leave the cache, are not counted: they lower a kernel's share of the limit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, and bytes moved."""

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The lower limit of the time: arithmetic or memory traffic, whichever takes longer."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def linear_logprob(n: int, d: int, v: int, itemsize: int, mode: str, kept_share: float = 0.0) -> Cost:
    """Forward and backward of linear_logprob; only forward for "no_grad".

    `mode`: "no_grad" (1G), "frozen" (2G) or "trainable" (3G if all tiles are kept, 4G if none is).
    `kept_share`: the fraction of the vocabulary whose tiles forward keeps for backward.
    """
    product = 2.0 * n * d * v
    operands = (n * d + v * d) * itemsize
    tiles = n * v * itemsize  # exponentials or gradients, which a kernel writes and GEMMs read
    if mode == "no_grad":
        return Cost(product, operands)
    if mode == "frozen":
        return Cost(2 * product, 2 * operands + 2 * tiles + n * d * (itemsize + 4))
    if mode == "trainable":
        recomputed = (1 - kept_share) * product
        gradients = (n * d + v * d) * itemsize + n * d * 4
        return Cost(3 * product + recomputed, 4 * operands + (3 + 2 * kept_share) * tiles + gradients)
    raise ValueError(f"linear_logprob: expected mode to have value 'no_grad', 'frozen' or 'trainable', got {mode!r}")


def logits_logprob(n: int, v: int, itemsize: int, backward: bool) -> Cost:
    """Forward reads the logits. Backward reads them again and writes the gradient."""
    return Cost(8.0 * n * v if backward else 4.0 * n * v, (3.0 if backward else 1.0) * n * v * itemsize)


def token_stats(n: int, d: int, v: int, itemsize: int) -> Cost:
    """As much as linear_logprob without a gradient."""
    return linear_logprob(n, d, v, itemsize, "no_grad")


def token_divergence(n: int, d_p: int, d_q: int, v: int, itemsize: int) -> Cost:
    """Two passes over both heads: one for the normalizers, one for the divergences."""
    p, q = (linear_logprob(n, d, v, itemsize, "no_grad") for d in (d_p, d_q))
    return Cost(2 * (p.flops + q.flops), 2 * (p.bytes + q.bytes))


def cwdpo_loss(n: int, pairs: int) -> Cost:
    """Per token 4 bytes of log-prob and 8 of label read, and 4 of gradient written. Per pair a few dozen bytes."""
    return Cost(4.0 * n, 16.0 * n + 64.0 * pairs)
