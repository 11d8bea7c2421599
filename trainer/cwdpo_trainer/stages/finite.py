"""A diverged stage stops with an error that names the step, before a broken model is saved.

The loss and the norm of the gradients are checked at every step, before the weights change. The weights are checked
before they are probed, sampled from or saved: reading all of them at every step would cost more and find nothing that
the next loss does not show.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cwdpo_trainer.errors import InputError

SHOWN = 3  # names of weights in an error
ADVICE = "lower learning_rate, raise warmup_steps, or look for wrong values in the model and the data"


def check_finite(where: str, what: str, value: Any) -> None:
    """Raise `InputError` unless the number `value` is finite. `where` names the stage and the step."""
    number = float(value)
    if not math.isfinite(number):
        raise InputError(where, what, f"a finite number ({ADVICE})", number)


@torch.no_grad()
def check_finite_weights(where: str, model: nn.Module, accelerator: Accelerator) -> None:
    """Raise `InputError` in all processes unless all trained weights of all processes are finite."""
    trained = {name: _local(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    # NaN passes through a minimum and a maximum. They need no memory, and on a CPU they take a fifth of the time of an
    # infinity norm.
    extremes = [torch.stack(torch.aminmax(weight)).float() for weight in trained.values() if weight.numel()]
    finite = torch.stack(extremes).isfinite().all(dim=1).tolist() if extremes else []
    names = [name for name, weight in trained.items() if weight.numel()]
    broken = [name for name, ok in zip(names, finite, strict=True) if not ok]
    count = torch.tensor(len(broken), device=accelerator.device)
    if accelerator.num_processes > 1:
        count = accelerator.reduce(count, "sum")
    if count.item():
        shown = ", ".join(broken[:SHOWN]) or "the shard of another process"
        more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise InputError(where, "weights", f"finite numbers ({ADVICE})", f"NaN or infinity in {shown}{more}")


def _local(weight: Tensor) -> Tensor:
    """This process's shard of a weight."""
    weight = weight.detach()
    return weight.to_local() if hasattr(weight, "to_local") else weight
