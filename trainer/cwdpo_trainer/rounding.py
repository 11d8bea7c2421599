"""Updates that vanish: a bfloat16 weight stays as it is if an update is smaller than half the distance to the next one.

bfloat16 has 8 significant bits, so neighbours of w lie |w| / 128 to |w| / 256 apart. AdamW moves a weight by about the
learning rate, which for fine-tuning is less than half of that for most weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

LOW_PRECISION = (torch.bfloat16, torch.float16)
FEW = 0.5  # share of the weights
CHUNK = 1 << 22  # weights at a time, so that float32 copies stay small
REMEDIES = "train float32 weights (model.dtype: float32, with bf16: true in the stages), or LoRA adapters"


def share_that_moves(model: nn.Module, size: float) -> float | None:
    """The share of the trained low-precision weights that an update of `size` changes, averaged over both directions.
    None if no such weight is trained."""
    moved = total = 0
    for weight in _chunks([parameter for parameter in model.parameters() if parameter.requires_grad]):
        if weight.dtype in LOW_PRECISION:
            exact = weight.float()
            moved += sum(int(((exact + step).to(weight.dtype) != weight).sum()) for step in (size, -size))
            total += 2 * weight.numel()
    return moved / total if total else None


def count_moved(model: nn.Module, start: nn.Module) -> tuple[int, int]:
    """How many of the trained weights of `model` differ from those of `start`, a copy of it; and how many there are."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    before = dict(start.named_parameters())
    pairs = [(weight, before[name]) for name, weight in trained if name in before]
    moved = total = 0
    for weight, old in zip(*(_chunks(column) for column in zip(*pairs, strict=True)), strict=True) if pairs else ():
        moved += int((weight != old).sum())
        total += weight.numel()
    return moved, total


def is_low_precision(model: nn.Module) -> bool:
    """Whether a trained weight has few bits."""
    return any(weight.requires_grad and weight.dtype in LOW_PRECISION for weight in model.parameters())


def is_rounded(optim: str, optim_args: str | None) -> bool:
    """Whether an optimizer of transformers makes updates of the learning rate's size and loses them to rounding."""
    compensated = any(
        name in (optim_args or "").replace(" ", "").lower()
        for name in ("bf16_stochastic_round=true", "use_kahan_summation=true")
    )
    return ("adam" in optim or "lion" in optim) and optim != "stable_adamw" and not compensated


def _chunks(weights: Iterable[Tensor]) -> Iterator[Tensor]:
    """Flat pieces of this process's shards."""
    for weight in weights:
        local: Tensor = weight.detach()
        local = local.to_local() if hasattr(local, "to_local") else local
        yield from local.reshape(-1).split(CHUNK)
