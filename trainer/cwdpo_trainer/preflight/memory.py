"""How much memory the head of one training step takes, with and without the fused head.

Predicted from shapes: the forward and backward of head and loss, beyond hidden states, weights and their gradients,
which both ways have. The backbone's activations, the optimizer and the reference are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

# What `cwdpo_kernels.MemoryBudget` stands for where nothing is set, by type of device.
WORKSPACE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
FLOAT32 = 4


@dataclass(frozen=True)
class HeadStep:
    """The shapes of a step: S `sequences` of T `tokens` (padding counts), N `labelled` tokens of all of them."""

    sequences: int
    tokens: int
    labelled: int
    vocab: int
    dim: int

    def whole_logits(self) -> int:
        """Bytes of logits, log-probs and their gradient, each [S, T, V] in float32, as a loss over a model's own
        logits holds them."""
        return 3 * FLOAT32 * self.sequences * self.tokens * self.vocab

    def fused(self, device: str) -> int:
        """Bytes of the fused head: a tile of logits and a few [N, D] (what it keeps lies in the head's gradient)."""
        logits = FLOAT32 * self.labelled * self.vocab
        rows = 4 * FLOAT32 * self.labelled * self.dim  # labelled hidden states, their gradient, direction or copies
        return min(WORKSPACE_BYTES.get(device, WORKSPACE_BYTES["cuda"]), logits) + rows


def size(count: int) -> str:
    """Bytes for people: KiB, MiB or GiB."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1024:.1f} KiB"
