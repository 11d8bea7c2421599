"""Measurements of `cwdpo check` with the loaded model: how many pairs negative filtering (`dpo.drop_below`) leaves out,
and how long a step takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cwdpo_kernels import Head, linear_sequence_logprob
from cwdpo_trainer.config.loader import RunConfig
from cwdpo_trainer.config.stage_arguments import StageArguments
from cwdpo_trainer.data.collator import Batch, PairCollator, SharedBatch, to_device
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.evaluation.doctor import KEPT_FEW
from cwdpo_trainer.models.loading import Model
from cwdpo_trainer.preflight.memory import counted
from cwdpo_trainer.preflight.simulation import enable_checkpointing, loss_of, precision, reference_sums
from cwdpo_trainer.stages.cooling import measure_cooling

ROWS = 32  # rows that filtering is measured on


@dataclass(frozen=True)
class Filtering:
    """Of the first `pairs` pairs, `left_out` have a rejected answer with a mean log-prob below `threshold`, in nats per
    token. `when`: " before stage 1" if the run has a stage 1, which changes these log-probs; else empty."""

    threshold: float
    left_out: int
    pairs: int
    when: str

    def __str__(self) -> str:
        return (
            f"negative filtering: dpo.drop_below {self.threshold:.2f} (nats per token) leaves out {self.left_out} of "
            f"the first {self.pairs} pairs{self.when}"
        )

    @property
    def leaves_almost_none(self) -> bool:
        return self.pairs - self.left_out <= KEPT_FEW * self.pairs


def measure_filtering(
    config: RunConfig, model: Model, collator: PairCollator, rows: Sequence[Row], device: torch.device
) -> Filtering | None:
    """The filtering of the first `ROWS` of `rows`, or None if the run filters nothing.

    `auto` values are measured on these rows. Raises `InputError` if they cannot be measured.
    """
    if config.dpo is None or config.dpo.drop_below is None or not config.dpo.has_cooling:
        return None
    rows = rows[:ROWS]
    mean_logp = _rejected_mean_logp(model, collator, rows, device)
    cooling = config.dpo.fixed_cooling
    if cooling is None:
        cooling = config.dpo.cooling_with(*measure_cooling(mean_logp, needs_tau=config.dpo.is_tau_measured))
    threshold: Any = cooling.drop_below  # a number, as dpo.drop_below is set
    left_out = int((mean_logp < threshold).sum())
    when = " before stage 1" if config.sft is not None else ""
    return Filtering(threshold, left_out, len(rows), when)


class TypicalStep(NamedTuple):
    """`args` of a stage, `rows` of median length for one micro-step, the `micro_steps` of an optimizer step, and the
    stage's number of optimizer `steps`."""

    args: StageArguments
    rows: Sequence[Row]
    micro_steps: int
    steps: int


@dataclass(frozen=True)
class StepTime:
    """The `seconds` that the optimizer step `step` takes."""

    step: TypicalStep
    seconds: float

    def __str__(self) -> str:
        args, rows, micro_steps, steps = self.step
        pairs = counted(len(rows), "pair")
        made_of = f"{micro_steps} x {pairs}" if micro_steps > 1 else pairs
        made_of += " of median length" + (", without torch_compile" if args.torch_compile else "")
        return (
            f"time of a step of stage {args.stage}: {duration(self.seconds)} ({made_of}), "
            f"{duration(steps * self.seconds)} for {steps} steps without probes, sampling and saving"
        )


def measure_step(model: Any, collator: PairCollator, step: TypicalStep) -> StepTime:
    """Time a micro-step after one to warm up: collation, reference, forward and backward.

    `collator`: makes token trees if the run shares prompts. The optimizer's update is not timed, and the weights do not
    change.
    """
    args = step.args
    enable_checkpointing(model, args)
    model.train()
    for _ in range(2):
        start = time.perf_counter()
        inputs = collator(step.rows)
        prompts = to_device(inputs["prompts"], args.device)
        batch = collator.join(prompts, inputs["chosen"], inputs["rejected"]).to(args.device)
        with precision(args):
            loss = batch.run(model, loss_of(args, batch, *reference_sums(model, args, batch))).loss
        loss.backward()
        loss.item()  # waits for the device
        seconds = time.perf_counter() - start
        model.zero_grad()
    model.eval()
    return StepTime(step, seconds * step.micro_steps)


def duration(seconds: float) -> str:
    """`seconds` with two significant digits, in seconds, minutes or hours."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"


@torch.no_grad()
def _rejected_mean_logp(model: Model, collator: PairCollator, rows: Sequence[Row], device: torch.device) -> Tensor:
    """The mean log-prob [R] of each row's rejected answer, in nats per token, one row at a time."""
    values = []
    for row in rows:
        pair = collator([row])
        batch = collator.join(pair["prompts"], pair["rejected"]).to(device)

        def op(hidden: Tensor, head: Head, batch: Batch | SharedBatch = batch) -> Tensor:
            return linear_sequence_logprob(hidden, head, batch.labels, batch.cu_seqlens).mean

        values.append(batch.run(model, op))
    return torch.cat(values).cpu()
