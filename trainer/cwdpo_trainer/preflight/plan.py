"""Plans a run: trained parameters, peak memory of a step, disk space, and what to change if it does not fit."""

from __future__ import annotations

import copy
import math
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from cwdpo_kernels.integrations.shared_prefix import why_no_trees
from cwdpo_trainer.config.arguments import LoraArguments, ModelArguments
from cwdpo_trainer.config.loader import KEEP
from cwdpo_trainer.config.stage_arguments import StageArguments
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.lengths import Length
from cwdpo_trainer.data.rows import Row, first_part
from cwdpo_trainer.errors import describe
from cwdpo_trainer.models.adapters import base_model
from cwdpo_trainer.models.forward_checks import predict_sharing
from cwdpo_trainer.preflight.memory import format_bytes
from cwdpo_trainer.preflight.parts import parameter_report
from cwdpo_trainer.preflight.run_rules import WARNING, Problem, RunPreview
from cwdpo_trainer.preflight.simulation import Simulation, StepMemory, predict_step

RUNTIME = 1 << 29  # bytes of a process before it loads a model: torch, a CUDA context
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
LONGEST = 1.25  # times the median: suggest a limit on length if the longest row exceeds this


@dataclass(frozen=True)
class PlannedStep:
    """What the memory of a stage's step depends on.

    `is_first`: the stage is the run's first one. `path`: of the model or adapter that the run starts from. `pairs`:
    rows with their lengths, the longest first. `shared`: prompts are encoded once for all their answers.
    """

    stage: str
    is_first: bool
    model: ModelArguments
    path: str
    lora: LoraArguments | None
    args: StageArguments
    collator: PairCollator
    pairs: Sequence[tuple[Row, Length]]
    shared: bool = False

    @property
    def batch(self) -> Sequence[tuple[Row, Length]]:
        return self.pairs[: self.args.per_device_train_batch_size]

    def simulation(self) -> Simulation:
        return Simulation.of(self.model, self.path, self.lora, self.args.device)

    def predict(self) -> StepMemory:
        """The memory of a step on the longest pairs, in bytes. Raises what the model raises."""
        rows = [row for row, _ in self.batch]
        return predict_step(self.simulation, self.args, self.collator, rows, self.shared, self.is_first)

    def tokens(self) -> int:
        """Tokens of a forward on the longest pairs, padding included."""
        lengths = [length for _, length in self.batch]
        if self.shared:  # the last token of an answer is no input
            return sum(length.prompt + length.chosen + length.rejected - 2 for length in lengths)
        return 2 * len(lengths) * max(length.total for length in lengths)

    def with_args(self, **changes: object) -> PlannedStep:
        args = copy.copy(self.args)
        for name, value in changes.items():
            setattr(args, name, value)
        return replace(self, args=args)


def plan_run(preview: RunPreview) -> Iterator[str | Problem]:
    """Lines about parameters, memory and disk, and a warning if memory or disk does not suffice."""
    steps = list(_steps(preview))
    if not steps:
        return
    if preview.config.model.quantization is not None:
        yield "memory of a step: not predicted for quantized weights"
        return
    try:
        model = steps[0].simulation().model  # for its parts and class
        yield from parameter_report(model)
        plans = [(each, each.predict()) for each in (_with_sharing(each, model) for each in steps)]
        for step, memory in plans:
            yield from _stage_report(step, memory, model)
    except Exception as error:  # of any type: a model may do what fake tensors do not support
        yield f"memory of a step: not predicted, because the model does not run without weights: {describe(error)}"
        return
    step, memory = max(plans, key=lambda plan: plan[1].total)
    available = device_memory(step.args.device)
    if memory.total + RUNTIME > available:
        yield _too_large(step, memory, available, model)
    yield from _disk(preview, plans)


def _steps(preview: RunPreview) -> Iterator[PlannedStep]:
    """One step for each stage, if config, model and at least one pair are valid. None of them shares prompts yet."""
    fit, config = preview.fits.get("train"), preview.config
    rows = fit.rows if fit else preview.valid_rows("train")
    lengths = preview.lengths.get("train", {})
    measured = fit.lengths if fit else [lengths[row.id] for row in rows]
    if preview.collator is None or preview.model is None or preview.model_path is None:
        return
    pairs = sorted(zip(rows, measured, strict=True), key=lambda pair: pair[1].total, reverse=True)
    for index, (stage, args) in enumerate(preview.stages().items()):
        if pairs:
            path, lora = preview.model_path, config.lora
            yield PlannedStep(stage, index == 0, config.model, path, lora, args, preview.collator, pairs)


def _with_sharing(step: PlannedStep, model: nn.Module) -> PlannedStep:
    """`step`, with shared prompts if the run is going to share them. `model` has no weights."""
    first = sorted(step.pairs, key=lambda pair: pair[0].id)
    prompts, setting = [length.prompt for _, length in first], step.model.prefix_sharing
    return replace(step, shared=predict_sharing(setting, model, prompts, step.args.torch_compile))


def _stage_report(step: PlannedStep, memory: StepMemory, model: nn.Module) -> Iterator[str]:
    device = step.args.device
    of = f"{format_bytes(device_memory(device))} on this {'machine' if device.type == 'cpu' else 'GPU'}"
    yield f"memory of a step of stage {step.stage}: {format_bytes(memory.total)} predicted ({of})"
    yield "  " + ", ".join(f"{kind} {format_bytes(count)}" for kind, count in memory.peak.items())
    pairs = len(step.batch)
    what = f"the {pairs} longest pairs" if pairs > 1 else "the longest pair"
    yield f"  for {what}, {_how(step)}; peak in {memory.moment}"
    if memory.assumed_optimizer:
        yield f"  the optimizer {step.args.optim} cannot be simulated: its state is assumed to be as large as AdamW's"
    other = replace(step, shared=not step.shared)
    if step.model.prefix_sharing == "auto" and (step.shared or why_no_trees(model) is None):
        yield f"  {format_bytes(other.predict().total)} with {_how(other)}"


def _how(step: PlannedStep) -> str:
    prompts = "shared prompts" if step.shared else "a prompt for each answer"
    return f"{prompts} ({step.tokens():,} tokens)"


def device_memory(device: torch.device) -> int:
    """Bytes of the GPU's memory, or of the machine's, or of the limit that a container has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [int(text) for file in CGROUP_LIMITS if file.is_file() and (text := file.read_text().strip()).isdigit()]
    return min(limits)


def _too_large(step: PlannedStep, memory: StepMemory, available: int, model: nn.Module) -> Problem:
    """A warning with the changes that help, the most effective first, each with the memory it leads to."""
    tried: list[tuple[int, str]] = []
    together = step
    for text, change in _remedies(step, model):
        try:
            total = change(step).predict().total
        except Exception:  # of any type: the model does not work with this change
            continue
        if total < memory.total:
            tried.append((total, text))
            together = change(together)
    evidence = (
        f"a step of stage {step.stage} needs {format_bytes(memory.total)} and the process {format_bytes(RUNTIME)}, "
        f"but only {format_bytes(available)} are available"
    )
    if not tried:
        return Problem(WARNING, "memory", evidence, "use a smaller model or a larger device")
    listed = "; ".join(f"{text} ({format_bytes(total)})" for total, text in sorted(tried))
    if len(tried) > 1:
        listed += f"; all of these ({format_bytes(together.predict().total)})"
    return Problem(WARNING, "memory", evidence, f"try these, best first, with the memory needed after each: {listed}")


def _remedies(step: PlannedStep, model: nn.Module) -> Iterator[tuple[str, Callable[[PlannedStep], PlannedStep]]]:
    args, stage = step.args, step.stage
    if not args.activation_checkpointing:
        yield f"{stage}.activation_checkpointing: true", lambda each: each.with_args(activation_checkpointing=True)
    pairs = args.per_device_train_batch_size
    if pairs > 1:
        steps = args.gradient_accumulation_steps * pairs
        text = f"{stage}.per_device_train_batch_size: 1 with gradient_accumulation_steps: {steps}"
        yield text, lambda each: each.with_args(per_device_train_batch_size=1, gradient_accumulation_steps=steps)
    if step.lora is None and base_model(step.path) == step.path:
        yield "a section lora", lambda each: replace(each, lora=LoraArguments())
    totals = [length.total for _, length in step.pairs]
    median = int(statistics.median_low(totals))
    if totals[0] > LONGEST * median:
        shorter = [pair for pair in step.pairs if pair[1].total <= median]
        text = f"data.max_length: {median}, the median, with data.over_length: skip"
        yield text, lambda each: replace(each, pairs=shorter)
    if not step.shared and why_no_trees(model) is None:
        yield "model.prefix_sharing: on", lambda each: replace(each, shared=True)
    if next(model.parameters()).dtype == torch.float32:
        narrow = replace(step.model, dtype="bfloat16")
        yield "model.dtype: bfloat16", lambda each: replace(each, model=narrow)


def _disk(preview: RunPreview, plans: Sequence[tuple[PlannedStep, StepMemory]]) -> Iterator[str | Problem]:
    """The largest disk use at any time: checkpoints with the optimizer's state, one more while a new one replaces an
    old one, and the models of this stage and of earlier ones. With `checkpoints: keep`, also earlier stages'
    checkpoints."""
    is_kept = preview.config.checkpoints == KEEP
    total, before, written, parts = 0.0, 0.0, 0.0, []
    for step, memory in plans:
        size = memory.saved + memory.state
        saves = count_saves(step.args, stage_rows(preview, step.stage))
        kept = min(saves, step.args.save_total_limit or saves)
        replaced = size if saves > kept else 0.0
        total = max(total, before + kept * size + replaced + memory.saved)
        before += memory.saved + (kept * size if is_kept else 0.0)
        written = max(written, replaced)
        checkpoints = f"{kept} x {format_bytes(round(size))} of checkpoints and " if kept else ""
        parts.append(f"{step.stage} {checkpoints}{format_bytes(round(memory.saved))} of weights")
    output = Path(preview.config.output_dir).resolve()
    folder = next(each for each in (output, *output.parents) if each.exists())
    free = shutil.disk_usage(folder).free
    more = f", {format_bytes(round(written))} while a checkpoint replaces another" if written else ""
    yield f"disk: {format_bytes(round(total))} predicted ({format_bytes(free)} free): {', '.join(parts)}{more}"
    if total > free:
        evidence = f"the run writes up to {format_bytes(round(total))} to {folder}, which has {format_bytes(free)} free"
        yield Problem(
            WARNING, "disk", evidence, "lower save_total_limit (to 2 at least), or set output_dir to another disk"
        )


def stage_rows(preview: RunPreview, stage: str) -> int:
    """Training rows of a stage."""
    fit = preview.fits.get("train")
    rows = len(preview.rows.get("train", ())) - (len(fit.skipped) if fit is not None else 0)
    first = first_part(rows, preview.config.data.sft_fraction)
    return rows if len(preview.config.stages) == 1 else {"sft": first, "dpo": rows - first}[stage]


def count_steps(args: StageArguments, rows: int) -> int:
    """Optimizer steps of a stage."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * math.ceil(_count_batches(args, rows) / args.gradient_accumulation_steps))


def count_micro_steps(args: StageArguments, rows: int) -> int:
    """Micro-steps of an optimizer step: the library's trainer makes one at the end of each epoch at the latest."""
    return min(args.gradient_accumulation_steps, _count_batches(args, rows))


def _count_batches(args: StageArguments, rows: int) -> int:
    """Batches of an epoch on each device."""
    return math.ceil(rows / (args.per_device_train_batch_size * args.world_size))


def count_saves(args: StageArguments, rows: int) -> int:
    """Checkpoints that a stage writes."""
    steps, strategy = count_steps(args, rows), str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "epoch":
        return math.ceil(args.num_train_epochs) if args.max_steps <= 0 else 1
    if strategy != "steps":
        return 0
    interval = args.save_steps if args.save_steps >= 1 else math.ceil(steps * args.save_steps)
    return math.ceil(steps / interval)
