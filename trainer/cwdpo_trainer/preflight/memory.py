"""Predicts the memory of the output head in one training step, with and without the fused head.

Counted: forward and backward of head and loss, without hidden states, weights and their gradients, which both need. Not
counted: activations of the backbone, the optimizer and the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from cwdpo_kernels import default_workspace_bytes

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class HeadStep:
    """The shapes of a step: S `sequences` of T `tokens` each, padding included, N of all these `labeled`."""

    sequences: int
    tokens: int
    labeled: int
    vocab: int
    dim: int

    def full_logits(self) -> int:
        """Bytes of a loss over the model's own logits: logits, log-probs and their gradient, each [S, T, V] in
        float32."""
        return 3 * FLOAT32 * self.sequences * self.tokens * self.vocab

    def fused(self, device: str) -> int:
        """Bytes of the fused head: a workspace of logits tiles, and four [N, D] in float32 (the labeled hidden
        states, their gradient and temporaries). Tiles kept for backward lie in the head's gradient."""
        logits = FLOAT32 * self.labeled * self.vocab
        hidden = 4 * FLOAT32 * self.labeled * self.dim
        return min(default_workspace_bytes(device), logits) + hidden


def format_bytes(count: int) -> str:
    """Bytes in KiB, MiB or GiB."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1024:.1f} KiB"


def counted(number: int, noun: str) -> str:
    """A number with its noun: `1 error`, `2 errors`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
