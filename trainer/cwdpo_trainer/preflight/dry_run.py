"""A run that stops before its first step: everything is read as a run reads it, and every mistake is collected."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from cwdpo_kernels.integrations.hugging_face import attach_head, check_head
from cwdpo_trainer.config.loader import RunConfig, prepare, read_config
from cwdpo_trainer.data.collator import PairCollator, to_device
from cwdpo_trainer.data.lengths import LengthMeter, fit_rows
from cwdpo_trainer.data.rows import Row, read_rows
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import InputError, describe, require, shorten
from cwdpo_trainer.models.causality import check_causal
from cwdpo_trainer.models.loading import base_model, load_model, load_processor, model_path
from cwdpo_trainer.preflight.row_rules import listed, row_problems
from cwdpo_trainer.preflight.run_rules import ERROR, WARNING, ModelFacts, Plan, Problem, problems_of


def dry_run(path: Path, overrides: Sequence[str], rows: int) -> tuple[Plan | None, list[Problem]]:
    """What the run of the YAML file at `path` would start from, and what is wrong with it.

    At most `rows` rows of each data set are looked at one by one, at even distances. Without model, data or
    output_dir there is no plan. `prepare` is called, and nothing else is written.
    """
    try:
        config, mistakes = read_config(path, overrides)
    except InputError as error:
        return None, [Problem(ERROR, "configuration", str(error), "correct the file")]
    problems = [Problem(ERROR, "configuration", str(mistake), "correct the key") for mistake in mistakes]
    if config is None:
        return None, problems
    plan = Plan(config)
    for step in (_prepared, _train, _heldout, _processor, _model, _rows, _fits):
        try:
            for problem in step(plan, rows):  # those before a mistake that ends the step count
                problems.append(problem)
        except InputError as error:
            name = step.__name__.removeprefix("_")
            problems.append(Problem(ERROR, name, str(error), "without it there is more that cannot be checked"))
    return plan, [*problems, *problems_of(plan)]


def _prepared(plan: Plan, rows: int) -> Iterator[Problem]:
    prepare(plan.config)
    yield from ()


def _train(plan: Plan, rows: int) -> Iterator[Problem]:
    return _data(plan, "train", rows)


def _heldout(plan: Plan, rows: int) -> Iterator[Problem]:
    return _data(plan, "heldout", rows)


def _data(plan: Plan, name: str, rows: int) -> Iterator[Problem]:
    source = open_source(getattr(plan.config.data, name), plan.config.base)
    plan.rows[name], errors = read_rows(source)
    plan.digests[name], plan.unused[name] = source.digest(), source.unused_columns()
    step = max(1, -(-len(plan.rows[name]) // rows))
    plan.sample[name] = plan.rows[name][::step]
    yield from _unusable_rows(plan, name, errors)
    require(bool(plan.rows[name]), source.name, "", "at least 1 valid row", 0)


def _unusable_rows(plan: Plan, name: str, errors: Sequence[InputError]) -> Iterator[Problem]:
    """One problem for each kind of mistake."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for error in errors:
        kinds[error.what, error.expected].append(f"{error.where}: {shorten(error.got, 120)}")
    skipped = plan.config.data.skip_bad_rows
    advice = "they are left out, as data.skip_bad_rows says" if skipped else "correct them, or set data.skip_bad_rows"
    total = len(plan.rows[name]) + len(errors)
    for (what, expected), evidence in kinds.items():
        head = f"{len(evidence)} of {total} rows of data.{name}: {what + ': ' if what else ''}expected {expected}, got"
        yield Problem(WARNING if skipped else ERROR, "unusable_rows", listed(head, evidence), advice)


def _processor(plan: Plan, rows: int) -> Iterator[Problem]:
    plan.collator = PairCollator(load_processor(model_path(plan.config)))
    plan.meter = LengthMeter(plan.collator)
    yield from ()


def _model(plan: Plan, rows: int) -> Iterator[Problem]:
    """From its configuration: no weights are read."""
    path = base_model(model_path(plan.config))
    try:
        settings = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(settings)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(path, "", "the config of a vision-language model", describe(error)) from error
    text = settings.get_text_config()
    head = model.get_output_embeddings()
    require(head is not None, path, type(model).__name__, "an output head over the vocabulary", "none")
    vocab, dim = head.weight.shape
    dtype = plan.config.model.torch_dtype
    if dtype == "auto":
        dtype = settings.dtype or text.dtype or torch.float32
    count = sum(parameter.numel() for parameter in model.parameters())
    positions = getattr(text, "max_position_embeddings", None)
    plan.model = ModelFacts(type(model).__name__, vocab, dim, positions, dtype, count)
    yield from ()


def _rows(plan: Plan, rows: int) -> Iterator[Problem]:
    if plan.collator is not None:
        for name in plan.sample:
            yield from row_problems(plan, name)


def _fits(plan: Plan, rows: int) -> Iterator[Problem]:
    data = plan.config.data
    for name, lengths in plan.lengths.items():
        good = [row for row in plan.sample[name] if row.id in lengths]
        if data.max_length is not None and good:
            plan.fits[name] = fit_rows(good, plan.meter, data.max_length, data.over_length)
    yield from ()


def first_pair(plan: Plan) -> Row | None:
    """A row of the training data that is good, as the run would use it."""
    fit = plan.fits.get("train")
    good = fit.rows if fit else [row for row in plan.sample.get("train", ()) if row.id in plan.lengths.get("train", {})]
    return good[0] if good else None


def self_test(config: RunConfig, collator: PairCollator, row: Row, device: torch.device) -> str:
    """Load the model and compare the fused log-probs of one pair with those of its own logits; a one-line summary.

    Raises what the model raises, `HeadError` where the two differ, `InputError` where an answer sees its own future.
    """
    model = load_model(config.model, model_path(config), config.lora)
    model = model if config.model.quantization else model.to(device)  # quantised weights are where they were put
    info = attach_head(model)
    pair = collator([row])
    inputs, labels = collator.join(pair["prompts"], pair["chosen"], pair["rejected"])
    batch = (to_device(inputs, device), labels.to(device))
    difference = check_head(model, *batch)
    check_causal(model, *batch)
    return f"{info}; on the pair {row.where} within {difference:.1e} nats"
