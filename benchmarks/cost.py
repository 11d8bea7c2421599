"""What each op has to do: floating-point operations and bytes, and the time that a chip's limits allow for it.

Legend: N labelled tokens, D hidden, V vocabulary, `itemsize` bytes of a hidden, weight or logit entry. One product of
the tokens with the head, "1G", is 2 N D V operations. Bytes are those that have to move through memory once; what a
kernel reads again (a GEMM's operands that leave the cache) is its own loss against this limit.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time: the slower of arithmetic and memory, perfectly overlapped."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def linear_logprob(n: int, d: int, v: int, itemsize: int, mode: str, kept_share: float = 0.0) -> Cost:
    """A step of linear_logprob. `mode`: "no_grad" (1G), "frozen" (2G), "trainable" (4G, less the tiles kept).

    `kept_share`: the part of the vocabulary whose tiles forward keeps for backward.
    """
    product = 2.0 * n * d * v
    operands = (n * d + v * d) * itemsize
    tiles = n * v * itemsize  # of exponentials or gradients: written by a kernel, read by the GEMMs
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
    """Forward reads the logits once; backward reads them once more and writes the gradient."""
    return Cost(8.0 * n * v if backward else 4.0 * n * v, (3.0 if backward else 1.0) * n * v * itemsize)


def token_stats(n: int, d: int, v: int, itemsize: int) -> Cost:
    return linear_logprob(n, d, v, itemsize, "no_grad")


def token_divergence(n: int, d_p: int, d_q: int, v: int, itemsize: int) -> Cost:
    """Both normalisers, then both heads' tiles side by side."""
    p, q = (linear_logprob(n, d, v, itemsize, "no_grad") for d in (d_p, d_q))
    return Cost(2 * (p.flops + q.flops), 2 * (p.bytes + q.bytes))


def cwdpo_loss(n: int, pairs: int) -> Cost:
    """Token log-probs (4 bytes) and labels (8) read, gradients (4) written; a few dozen bytes a pair."""
    return Cost(4.0 * n, 16.0 * n + 64.0 * pairs)
