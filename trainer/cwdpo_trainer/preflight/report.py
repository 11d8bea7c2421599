"""The report of `cwdpo check`: versions and backends, then what a run would start from and every mistake."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

import cwdpo_kernels
from cwdpo_kernels.integrations.hugging_face import HeadError
from cwdpo_trainer.data.lengths import Length
from cwdpo_trainer.errors import InputError, describe
from cwdpo_trainer.evaluation.summary import PACKAGES
from cwdpo_trainer.preflight.dry_run import dry_run, self_test, typical_steps, valid_pairs
from cwdpo_trainer.preflight.memory import HeadStep, counted, format_bytes
from cwdpo_trainer.preflight.plan import plan_run
from cwdpo_trainer.preflight.run_rules import ERROR, Problem, RunPreview
from cwdpo_trainer.reporter import say

BINS = 8
BAR = 40  # characters
LENGTHS: dict[str, Callable[[Length], int]] = {
    "whole pair (prompt, images, longer answer)": lambda length: length.total,
    "images": lambda length: length.image,
    "chosen answer": lambda length: length.chosen,
    "rejected answer": lambda length: length.rejected,
}


def environment_report() -> str:
    """Versions and the backend of each device, with the reason where the faster backend is unavailable."""
    lines = [("cwdpo_kernels", cwdpo_kernels.__version__), ("python", platform.python_version())]
    lines += [(package, _version(package)) for package in ("triton", *PACKAGES)]
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            lines.append(("backend on cuda", "none (torch finds no GPU)"))
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


def check_run(path: Path, overrides: Sequence[str], rows: int, load: bool, call_prepare: bool) -> int:
    """Print the report on the config file at `path`. Returns the exit status: 1 if there are errors, else 0.

    Checks at most `rows` rows of each dataset one by one. `load`: load the model and run one pair through it.
    `call_prepare`: call the config's `prepare` function, which a dry run skips.
    """
    say(environment_report())
    preview, problems = dry_run(path, overrides, rows, call_prepare)
    if preview is not None:
        if preview.config.preset is not None:
            say(f"\n{preview.config.preset}")
        if preview.config.dpo is not None:
            say(f"\n{preview.config.dpo.describe_loss()}")
        for name in preview.rows:
            say("\n".join(_dataset_report(preview, name)))
        say("\n".join(_model_report(preview)))
        problems += _said(plan_run(preview))
        if load:
            problems += _self_test(preview)
    say()
    for problem in sorted(problems, key=lambda problem: problem.severity != ERROR):
        say(str(problem))
    errors = sum(problem.severity == ERROR for problem in problems)
    say(f"{counted(errors, 'error')}, {counted(len(problems) - errors, 'warning')}")
    return int(errors > 0)


def _dataset_report(preview: RunPreview, name: str) -> list[str]:
    lengths = list(preview.lengths.get(name, {}).values())
    checked = f"{len(preview.sample[name])} of {len(preview.rows[name])} rows checked, {len(lengths)} valid"
    lines = [f"\ndata.{name}: {getattr(preview.config.data, name)} ({checked})"]
    if preview.unused.get(name):
        lines.append("  unused columns: " + ", ".join(preview.unused[name]))
    for title, length_of in LENGTHS.items():
        if lengths:
            lines += histogram(f"tokens, {title}", [length_of(length) for length in lengths])
    return lines


def histogram(title: str, values: Sequence[int]) -> list[str]:
    """The distribution of integers as text: a title, and at most `BINS` bins of equal width."""
    low, high = min(values), max(values)
    if low == high:
        return [f"  {title}: all {low}"]
    median = sorted(values)[len(values) // 2]
    lines = [f"  {title}: {low} to {high}, median {median}"]
    width = -(-(high - low + 1) // BINS)
    counts = [0] * -(-(high - low + 1) // width)
    for value in values:
        counts[(value - low) // width] += 1
    for index, count in enumerate(counts):
        first = low + index * width
        last = min(first + width - 1, high)
        edges = f"{first}" if first == last else f"{first} - {last}"
        lines.append(f"    {edges:>15} {'#' * -(-BAR * count // max(counts)):{BAR}} {count}")
    return lines


def _model_report(preview: RunPreview) -> list[str]:
    if preview.model is None:
        return []
    model, dtype = preview.model, str(preview.model.dtype).removeprefix("torch.")
    lines = [f"\n{model.name}: {model.parameters:,} parameters in {dtype}, head {model.vocab} x {model.dim}"]
    fit, stages = preview.fits.get("train"), preview.stages()
    lengths = fit.lengths if fit else preview.lengths.get("train", {}).values()
    if not lengths or not stages:
        return lines
    stage, args = max(stages.items(), key=lambda item: item[1].per_device_train_batch_size)
    longest = sorted(lengths, key=lambda length: length.total, reverse=True)[: args.per_device_train_batch_size]
    if not longest:
        return lines
    labeled = sum(length.chosen + length.rejected for length in longest)
    step = HeadStep(2 * len(longest), longest[0].total, labeled, model.vocab, model.dim)
    fused, full = format_bytes(step.fused(args.device.type)), format_bytes(step.full_logits())
    return [
        *lines,
        f"  memory of the head in one step of stage {stage}: {fused} fused, {full} with full logits",
        f"    predicted for the {len(longest)} longest pairs: {step.sequences} sequences of {step.tokens} tokens, "
        f"{step.labeled} of them labeled in total",
        "    without hidden states, weights and gradients, backbone, optimizer and reference",
    ]


def _said(found: Iterable[str | Problem]) -> list[Problem]:
    """Print the lines among what was found. Returns the problems."""
    problems = []
    for each in found:
        if isinstance(each, Problem):
            problems.append(each)
        else:
            say(f"  {each}")
    return problems


def _self_test(preview: RunPreview) -> list[Problem]:
    rows, stages = valid_pairs(preview), preview.stages()
    if not rows or preview.collator is None or preview.model is None or not stages:
        say("  self-test skipped: it needs a valid pair, a model and a stage")
        return []
    device = next(iter(stages.values())).device
    problems: list[Problem] = []
    try:
        problems += _said(self_test(preview.config, preview.collator, rows, device, typical_steps(preview)))
    except (InputError, HeadError) as error:
        problems.append(Problem(ERROR, "self_test", str(error), "the run would stop before its first step"))
    except Exception as error:  # of any type: it would stop the run
        problems.append(Problem(ERROR, "self_test", describe(error, 400), "the run would stop at its first batch"))
    return problems
