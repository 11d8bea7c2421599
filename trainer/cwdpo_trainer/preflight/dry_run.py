"""The dry run of `cwdpo check`: read everything as a run would, and collect every mistake."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cwdpo_kernels.integrations.hugging_face import attach_head, check_head
from cwdpo_kernels.integrations.shared_prefix import why_no_trees
from cwdpo_trainer.config.loader import COMMAND_LINE, RunConfig, prepare, read_config
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.lengths import LengthMeter, fit_rows
from cwdpo_trainer.data.rows import Row, read_rows
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import InputError, require, shorten
from cwdpo_trainer.models.adapters import base_model
from cwdpo_trainer.models.forward_checks import check_causal, choose_sharing
from cwdpo_trainer.models.kinds import EXPECTED, auto_class
from cwdpo_trainer.models.kinds import read_config as read_model_config
from cwdpo_trainer.models.loading import Model, check_quantization, load_model, load_processor, model_path, move
from cwdpo_trainer.models.reading import loading
from cwdpo_trainer.preflight.plan import count_micro_steps, count_steps, stage_rows
from cwdpo_trainer.preflight.row_rules import list_evidence, row_problems
from cwdpo_trainer.preflight.run_rules import ERROR, WARNING, ModelFacts, Problem, RunPreview, run_problems
from cwdpo_trainer.preflight.trial import TypicalStep, measure_filtering, measure_step
from cwdpo_trainer.rounding import FEW, REMEDIES, is_rounded, share_that_moves


def dry_run(
    path: Path, overrides: Sequence[str], rows: int, call_prepare: bool = False
) -> tuple[RunPreview | None, list[Problem]]:
    """Preview the run of the config file at `path`. Returns the preview and all problems.

    Checks at most `rows` rows of each dataset one by one, evenly spaced. The preview is None if the config lacks model,
    data or output_dir. Writes nothing, and imports and calls the config's `prepare` function only if `call_prepare` is
    set.
    """
    try:
        config, mistakes = read_config(path, overrides)
    except InputError as error:
        advice = "correct the override" if error.where == COMMAND_LINE else "correct the file"
        return None, [Problem(ERROR, "config", str(error), advice)]
    problems = [Problem(ERROR, "config", str(mistake), "correct this key") for mistake in mistakes]
    if config is None:
        return None, problems
    preview = RunPreview(config, call_prepare=call_prepare)
    for step in (_prepare, _train, _heldout, _model_path, _processor, _model, _rows, _max_length):
        try:
            for problem in step(preview, rows):  # not `extend`: keep those found before an error
                problems.append(problem)
        except InputError as error:
            name = step.__name__.removeprefix("_")
            advice = "correct this first; checks that depend on it were skipped"
            if str(error) not in (problem.evidence for problem in problems):  # processor and model share files
                problems.append(Problem(ERROR, name, str(error), advice))
    return preview, [*problems, *run_problems(preview)]


def _prepare(preview: RunPreview, rows: int) -> Iterator[Problem]:
    preparation = preview.config.preparation
    if preparation is None or preview.call_prepare:
        prepare(preview.config)
        return
    evidence = f"skipped the call {shorten(preparation)}: check does not execute what a config names"
    yield Problem(WARNING, "prepare", evidence, "if it makes files that are missing: cwdpo check CONFIG --prepare")


def _train(preview: RunPreview, rows: int) -> Iterator[Problem]:
    return _dataset(preview, "train", rows)


def _heldout(preview: RunPreview, rows: int) -> Iterator[Problem]:
    return _dataset(preview, "heldout", rows)


def _dataset(preview: RunPreview, name: str, rows: int) -> Iterator[Problem]:
    source = open_source(getattr(preview.config.data, name), preview.config.base)
    preview.rows[name], errors = read_rows(source)
    preview.digests[name], preview.unused[name] = source.digest(), source.unused_columns()
    step = max(1, -(-len(preview.rows[name]) // rows))
    preview.sample[name] = preview.rows[name][::step]
    yield from _invalid_rows(preview, name, errors)
    require(bool(preview.rows[name]), source.name, "", "at least 1 valid row", 0)


def _invalid_rows(preview: RunPreview, name: str, errors: Sequence[InputError]) -> Iterator[Problem]:
    """One problem for each kind of mistake."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for error in errors:
        got = f"got {shorten(error.got, 120)}" if error.expected else shorten(error.mismatch, 120)
        kinds[error.what, error.expected].append(f"{error.where}: {got}")
    skip = preview.config.data.skip_bad_rows
    advice = "data.skip_bad_rows is set: the run skips them" if skip else "correct them or set data.skip_bad_rows"
    total = len(preview.rows[name]) + len(errors)
    for (what, expected), evidence in kinds.items():
        parts = (f"{len(evidence)} of {total} rows of data.{name}", what, f"expected {expected}" if expected else "")
        summary = ": ".join(part for part in parts if part) + ":"
        yield Problem(WARNING if skip else ERROR, "invalid_rows", list_evidence(summary, evidence), advice)


def _model_path(preview: RunPreview, rows: int) -> Iterator[Problem]:
    preview.model_path = model_path(preview.config)
    yield from ()


def _processor(preview: RunPreview, rows: int) -> Iterator[Problem]:
    if preview.model_path is None:
        return
    preview.collator = PairCollator(load_processor(preview.model_path))
    preview.meter = LengthMeter(preview.collator)
    yield from ()


def _model(preview: RunPreview, rows: int) -> Iterator[Problem]:
    """Build the model on the meta device from its config. Reads no weights."""
    if preview.model_path is None:
        return
    path = base_model(preview.model_path)
    config = read_model_config(path)
    kind = auto_class(path, config)
    with loading(path, EXPECTED), torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    head = model.get_output_embeddings()
    require(head is not None, path, type(model).__name__, "an output head over the vocabulary", "none")
    vocab, dim = head.weight.shape
    dtype = preview.config.model.torch_dtype
    # A string is `auto`: the dtype of the saved weights.
    loaded: torch.dtype = (config.dtype or text.dtype or torch.float32) if isinstance(dtype, str) else dtype
    parameters = sum(parameter.numel() for parameter in model.parameters())
    positions = getattr(text, "max_position_embeddings", None)
    preview.model = ModelFacts(type(model).__name__, vocab, dim, positions, loaded, parameters)
    reason = why_not_shared(preview.config, model)
    if preview.config.model.prefix_sharing == "on" and reason is not None:
        yield Problem(ERROR, "prefix_sharing", f"model.prefix_sharing is on, but {reason}", "set it to auto or off")


def _rows(preview: RunPreview, rows: int) -> Iterator[Problem]:
    if preview.meter is not None:
        for name in preview.sample:
            yield from row_problems(preview, preview.meter, name)


def _max_length(preview: RunPreview, rows: int) -> Iterator[Problem]:
    data = preview.config.data
    for name in preview.lengths:
        valid = preview.valid_rows(name)
        if data.max_length is not None and preview.meter is not None and valid:
            preview.fits[name] = fit_rows(valid, preview.meter, data.max_length, data.over_length)
    yield from ()


def typical_steps(preview: RunPreview) -> list[TypicalStep]:
    """One for each stage. The rows are the middle ones of the training sample, ordered by length."""
    fit, rows = preview.fits.get("train"), valid_pairs(preview)
    lengths = preview.lengths.get("train", {})
    totals = [length.total for length in (fit.lengths if fit else (lengths[row.id] for row in rows))]
    by_length = [row for _, row in sorted(zip(totals, rows, strict=True), key=lambda pair: pair[0])]
    found = []
    for stage, args in preview.stages().items():
        count = args.per_device_train_batch_size
        first = max((len(by_length) - count) // 2, 0)
        own = stage_rows(preview, stage)
        middle = by_length[first:][:count]
        found.append(TypicalStep(args, middle, count_micro_steps(args, own), count_steps(args, own)))
    return found


def valid_pairs(preview: RunPreview) -> list[Row]:
    """The valid rows of the training sample, as the run would use them."""
    fit = preview.fits.get("train")
    return fit.rows if fit else preview.valid_rows("train")


def self_test(
    config: RunConfig, collator: PairCollator, rows: Sequence[Row], device: torch.device, typical: Sequence[TypicalStep]
) -> Iterator[str | Problem]:
    """Load the model, compare the fused log-probs of the first pair with those of its own logits, count the pairs that
    negative filtering leaves out, and time a step of each stage. Yields a line about each, and a warning if the
    weights' dtype loses most updates.

    Raises `HeadError` if the log-probs differ, `InputError` if the model attends to later tokens of an answer, and
    whatever the model raises.
    """
    model = load_model(config.model, model_path(config), config.lora)
    check_quantization(model, device)
    yield from rounded_updates(config, model)
    move(model, device)
    head_info = attach_head(model)
    pair = collator([rows[0]])
    batch = collator.join_padded(pair["prompts"], pair["chosen"], pair["rejected"]).to(device)
    difference = check_head(model, batch.inputs, batch.labels)
    check_causal(model, batch.inputs, batch.labels)
    yield f"self-test: {head_info}; log-probs of {rows[0].where} agree within {difference:.1e} nats"
    compiled = any(config.stage(stage).torch_compile for stage in config.stages)
    setting = config.model.prefix_sharing
    choice = choose_sharing(setting, [model], model.eval(), collator, rows, device, compiled)
    yield str(choice)
    filtering = measure_filtering(config, model, collator, rows, device)
    if filtering is not None:
        yield str(filtering)
    if filtering is not None and filtering.leaves_almost_none:
        evidence = (
            f"dpo.drop_below leaves {filtering.pairs - filtering.left_out} of {filtering.pairs} pairs in the loss"
        )
        advice = "lower dpo.drop_below, set it to null, or use harder negatives"
        yield Problem(WARNING, "nothing_kept", f"{evidence}{filtering.when}", advice)
    own = collator.on_trees(model) if choice.is_shared else collator
    for step in typical:
        yield str(measure_step(model, own, step))


def why_not_shared(config: RunConfig, model: Any) -> str | None:
    """Why the run of `config` cannot share prompts, judging by its options and the model's class; else None."""
    compiled = [stage for stage in config.stages if config.stage(stage).torch_compile]
    if compiled:
        return f"{', '.join(f'{stage}.torch_compile' for stage in compiled)} is on"
    return why_no_trees(model)


def rounded_updates(config: RunConfig, model: Model) -> Iterator[Problem]:
    """Warn of stages that lose the updates of most weights of `model` to rounding, with the share that moves."""
    shares = {}
    for stage in config.stages:
        args: Any = config.stage(stage)
        share = share_that_moves(model, args.learning_rate) if is_rounded(args.optim.value, args.optim_args) else None
        if share is not None and share < FEW:
            shares[f"{stage}.learning_rate {args.learning_rate:g}"] = share
    if shares:
        listed = "; ".join(f"{what} moves at most {share:.2%} of them" for what, share in shares.items())
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
        evidence = f"the {', '.join(dtypes)} weights would lose most updates to rounding: {listed} per step"
        yield Problem(WARNING, "rounded_updates", evidence, REMEDIES)
