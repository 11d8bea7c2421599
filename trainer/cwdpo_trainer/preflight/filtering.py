"""How many pairs negative filtering (`dpo.drop_below`) leaves out, measured with the model that the run starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cwdpo_kernels import linear_sequence_logprob
from cwdpo_trainer.config.loader import RunConfig
from cwdpo_trainer.data.collator import PairCollator, to_device
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.models.loading import Model
from cwdpo_trainer.stages.cooling import measure_cooling

ROWS = 32  # that are measured


def filtering_report(
    config: RunConfig, model: Model, collator: PairCollator, rows: Sequence[Row], device: torch.device
) -> str | None:
    """One line on the first `ROWS` of `rows`, or None if the run filters nothing.

    `auto` values are measured on these rows. Stage 1 changes what the model finds likely, so the line says if it comes
    first. Raises `InputError` if `auto` cannot be measured.
    """
    if config.dpo is None or config.dpo.drop_below is None:
        return None
    rows = rows[:ROWS]
    mean_logp = _rejected_mean_logp(model, collator, rows, device)
    cooling = config.dpo.fixed_cooling or config.dpo.cooling_with(*measure_cooling(mean_logp))
    threshold: Any = cooling.drop_below  # a number, as dpo.drop_below is set
    left_out = int((mean_logp < threshold).sum())
    when = " before stage 1" if config.sft is not None else ""
    return (
        f"negative filtering: dpo.drop_below {threshold:.2f} (nats per token) leaves out {left_out} of the "
        f"first {len(rows)} pairs{when}"
    )


@torch.no_grad()
def _rejected_mean_logp(model: Model, collator: PairCollator, rows: Sequence[Row], device: torch.device) -> Tensor:
    """The mean log-prob [R] of each row's rejected answer, in nats per token, one row at a time."""
    values = []
    for row in rows:
        pair = collator([row])
        inputs, labels = collator.join(pair["prompts"], pair["rejected"])
        labels = labels.to(device)
        values.append(
            model(
                **to_device(inputs, device),
                head_op=lambda hidden, head, labels=labels: linear_sequence_logprob(hidden, head, labels).mean,
            )
        )
    return torch.cat(values).cpu()
