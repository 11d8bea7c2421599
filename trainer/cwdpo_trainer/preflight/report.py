"""`cwdpo check`: the environment; with a configuration also a dry run: what it would train on, and what is wrong."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import cwdpo_kernels
from cwdpo_trainer.data.lengths import Length
from cwdpo_trainer.errors import describe
from cwdpo_trainer.preflight.dry_run import dry_run, first_pair, self_test
from cwdpo_trainer.preflight.memory import HeadStep, size
from cwdpo_trainer.preflight.run_rules import ERROR, Plan, Problem
from cwdpo_trainer.reporter import say

PACKAGES = ("torch", "triton", "transformers", "accelerate")
BINS = 8
BAR = 40  # characters
FIGURES: dict[str, Callable[[Length], int]] = {
    "prompt, images and longer answer": lambda length: length.total,
    "images": lambda length: length.image,
    "chosen answer": lambda length: length.chosen,
    "rejected answer": lambda length: length.rejected,
}


def environment_report() -> str:
    """Lines of "what  value"; the reason follows where a device has to do without its faster backend."""
    lines = [("cwdpo_kernels", cwdpo_kernels.__version__), ("python", platform.python_version())]
    lines += [(package, _version(package)) for package in PACKAGES]
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            lines.append(("backend on cuda", "no GPU that torch can use"))
            continue
        lines.append((f"backend on {device}", cwdpo_kernels.backend(device)))
        reason = cwdpo_kernels.missing_backend(device)
        if reason:
            lines.append(("", reason))
    return "\n".join(f"{what:18}{value}" for what, value in lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_run(path: Path, overrides: Sequence[str], rows: int, load: bool) -> int:
    """Print what the run of the YAML file at `path` would start from, and all problems; 1 if one is an error, else 0.

    `rows` of each data set are looked at one by one. `load`: the model is loaded, and tried on one pair.
    """
    say(environment_report())
    plan, problems = dry_run(path, overrides, rows)
    if plan is not None:
        for name in plan.rows:
            say("\n".join(_data_report(plan, name)))
        say("\n".join(_model_report(plan)))
        if load:
            problems += _self_test(plan)
    say()
    for problem in sorted(problems, key=lambda problem: problem.severity != ERROR):
        say(str(problem))
    errors = sum(problem.severity == ERROR for problem in problems)
    say(f"{errors} errors, {len(problems) - errors} warnings")
    return int(errors > 0)


def _data_report(plan: Plan, name: str) -> list[str]:
    lengths = list(plan.lengths.get(name, {}).values())
    looked = f"{len(plan.sample[name])} of {len(plan.rows[name])} rows looked at, {len(lengths)} of them good"
    lines = [f"\ndata.{name}: {getattr(plan.config.data, name)} ({looked})"]
    if plan.unused.get(name):
        lines.append("  columns that are not used: " + ", ".join(plan.unused[name]))
    for title, figure in FIGURES.items():
        if lengths:
            lines += histogram(f"tokens, {title}", [figure(length) for length in lengths])
    return lines


def histogram(title: str, values: Sequence[int]) -> list[str]:
    """The distribution of whole numbers as lines of text: at most `BINS` bins of one width."""
    low, high = min(values), max(values)
    median = sorted(values)[len(values) // 2]
    lines = [f"  {title}: {low} to {high}, median {median}"]
    if low == high:
        return lines
    width = -(-(high - low + 1) // BINS)
    counts = [0] * -(-(high - low + 1) // width)
    for value in values:
        counts[(value - low) // width] += 1
    for place, count in enumerate(counts):
        start = low + place * width
        bar = "#" * -(-BAR * count // max(counts))
        lines.append(f"    {start:6} - {min(start + width - 1, high):6} {bar:{BAR}} {count}")
    return lines


def _model_report(plan: Plan) -> list[str]:
    if plan.model is None:
        return []
    model, dtype = plan.model, str(plan.model.dtype).removeprefix("torch.")
    lines = [f"\n{model.name}: {model.parameters:,} parameters in {dtype}, head {model.vocab} x {model.dim}"]
    fit, stages = plan.fits.get("train"), plan.stages()
    lengths = fit.lengths if fit else plan.lengths.get("train", {}).values()
    if not lengths or not stages:
        return lines
    stage, args = max(stages.items(), key=lambda item: item[1].per_device_train_batch_size)
    longest = sorted(lengths, key=lambda length: length.total, reverse=True)[: args.per_device_train_batch_size]
    if not longest:
        return lines
    labelled = sum(length.chosen + length.rejected for length in longest)
    step = HeadStep(2 * len(longest), longest[0].total, labelled, model.vocab, model.dim)
    device = args.device.type
    shape = f"{step.sequences} sequences of {step.tokens} tokens, {step.labelled} labelled"
    return [
        *lines,
        f"  head of a step of stage {stage}, predicted for the {len(longest)} longest pairs ({shape}):",
        f"    fused {size(step.fused(device))}, with whole logits {size(step.whole_logits())}",
        "    beyond hidden states, weights and their gradients; without backbone, optimizer and reference",
    ]


def _self_test(plan: Plan) -> list[Problem]:
    row, stages = first_pair(plan), plan.stages()
    if row is None or not stages:
        say("  self-test: not done, as there is no good pair or no stage")
        return []
    device = next(iter(stages.values())).device
    try:
        say(f"  self-test: {self_test(plan.config, plan.collator, row, device)}")
    except Exception as error:  # whatever the model raises would stop the run
        return [
            Problem(ERROR, "self_test", describe(error, 400), "the run would stop at its first batch; see the message")
        ]
    return []
