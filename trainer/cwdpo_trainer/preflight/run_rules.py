"""Checks of a run as a whole for `cwdpo check`: its config, its datasets and its model.

A rule is a function of the `RunPreview`. It returns (evidence, advice), or None if it finds nothing or lacks what it
needs (an unreadable model is reported separately). An error stops the run or makes it train on something unintended. A
warning is a reason to look. Rules about single rows are in row_rules.py.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from cwdpo_kernels import PREFERENCE_LOSSES
from cwdpo_trainer.config.loader import RunConfig
from cwdpo_trainer.config.stage_arguments import StageArguments
from cwdpo_trainer.config.training_rules import check_batches
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.images import IMAGE_ERRORS
from cwdpo_trainer.data.lengths import Fit, Length, LengthMeter
from cwdpo_trainer.data.rows import Row, answer_text, first_part
from cwdpo_trainer.errors import InputError, did_you_mean
from cwdpo_trainer.evaluation.doctor import needs_answers
from cwdpo_trainer.evaluation.history import MIN_ANSWERS
from cwdpo_trainer.evaluation.probes import COOLING_BINS, METRICS
from cwdpo_trainer.models.digests import input_digests
from cwdpo_trainer.models.loading import model_path
from cwdpo_trainer.negatives.sampling import normalize
from cwdpo_trainer.run_folder import RunFolder

ERROR, WARNING = "error", "warning"
EVIDENCE_SHOWN = 5  # rows that a problem lists
LARGE_MODEL = 100_000_000  # parameters; smaller models are often trained from scratch, with higher learning rates
# Published full fine-tuning of vision-language models uses 1e-6 to 2e-5 for SFT and 5e-7 to 5e-6 for DPO; LoRA uses 10
# to 20 times as much. Ten times the upper end mostly diverges.
HIGHEST_RATE = {"sft": 2e-4, "dpo": 5e-5}
LORA_RATE = 20
LOWEST_RATE = 1e-8  # smaller AdamW steps leave bfloat16 weights unchanged
BETAS = {"sequence": (0.01, 1.0), "token": (0.1, 20.0)}  # DPO on sums; losses on means
BETAS_OF_LOSS = {"simpo": (1.0, 20.0), "sppo_hard": (1e-4, 1.0)}  # SPPO's beta is 1 / eta, with eta 1000 in its paper
LONGER = 1.5  # tokens of chosen answers per token of rejected ones
LONGER_SHARE = 0.8  # of the pairs

Diagnosis = tuple[str, str]


@dataclass(frozen=True)
class Problem:
    """What the rule `name` found: the `severity` (ERROR or WARNING), the evidence and what to do."""

    severity: str
    name: str
    evidence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity} {self.name}: {self.evidence}\n  -> {self.advice}"


@dataclass(frozen=True)
class ModelFacts:
    """A model as its config describes it: `vocab` x `dim` of the head, the number of `positions` (None: no limit), the
    `dtype` that its weights are loaded in, and the number of `parameters`."""

    name: str
    vocab: int
    dim: int
    positions: int | None
    dtype: torch.dtype
    parameters: int


@dataclass
class RunPreview:
    """What a run would start from, as far as it can be read. Dictionaries have the keys `train` and `heldout`.

    `unused`: columns that are not read. `model_path`: the model's folder or name. `sample`: the rows that are checked
    one by one. `lengths` of those without a mistake, by row id. `fits`: the outcome of data.max_length for them, if it
    is set. `call_prepare`: call the config's `prepare` function.
    """

    config: RunConfig
    call_prepare: bool = False
    digests: dict[str, str] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    sample: dict[str, list[Row]] = field(default_factory=dict)
    collator: PairCollator | None = None
    meter: LengthMeter | None = None
    lengths: dict[str, dict[int, Length]] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    model_path: str | None = None
    model: ModelFacts | None = None

    def stages(self) -> dict[str, StageArguments]:
        return {name: self.config.stage(name) for name in self.config.stages}

    def valid_rows(self, name: str) -> list[Row]:
        """The rows of a sample that no rule objects to."""
        lengths = self.lengths.get(name, {})
        return [row for row in self.sample.get(name, ()) if row.id in lengths]

    def all_lengths(self) -> list[Length]:
        return [length for of_dataset in self.lengths.values() for length in of_dataset.values()]


Rule = Callable[[RunPreview], Diagnosis | None]
_RULES: dict[str, tuple[str, Rule]] = {}


def _rule(severity: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES[function.__name__] = severity, function
        return function

    return register


def run_problems(preview: RunPreview) -> Iterator[Problem]:
    """Apply the rules of this file."""
    for name, (severity, rule) in _RULES.items():
        diagnosis = rule(preview)
        if diagnosis is not None:
            yield Problem(severity, name, *diagnosis)


def list_rows(rows: Sequence[Row | str]) -> str:
    """Where the first `EVIDENCE_SHOWN` rows are, and how many more there are."""
    shown = [row if isinstance(row, str) else row.where for row in rows[:EVIDENCE_SHOWN]]
    more = len(rows) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


@_rule(ERROR)
def no_training_batch(preview: RunPreview) -> Diagnosis | None:
    fit = preview.fits.get("train")
    rows = len(preview.rows.get("train", ())) - (len(fit.skipped) if fit is not None else 0)
    stages = preview.config.stages
    if rows < len(stages):
        return None  # found elsewhere
    first = first_part(rows, preview.config.data.sft_fraction)
    sizes = {"sft": first, "dpo": rows - first} if len(stages) == 2 else dict.fromkeys(stages, rows)
    try:
        for stage, args in preview.stages().items():
            check_batches(args, stage, sizes[stage])
    except InputError as error:
        return str(error), "the stage would make no step: turn the option off, or lower per_device_train_batch_size"
    return None


@_rule(ERROR)
def float16_weights(preview: RunPreview) -> Diagnosis | None:
    """Gradient scaling needs float32 weights, and float16 loses updates below 6e-8."""
    if preview.model is None or preview.model.dtype != torch.float16:
        return None
    origin = "model.dtype" if preview.config.model.dtype == "float16" else "the dtype of the saved model"
    return f"the weights would be trained in float16 ({origin})", "set model.dtype to bfloat16 or float32"


@_rule(WARNING)
def learning_rate(preview: RunPreview) -> Diagnosis | None:
    large = preview.model is not None and preview.model.parameters >= LARGE_MODEL
    wrong = []
    for stage, args in preview.stages().items():
        highest = HIGHEST_RATE[stage] * (LORA_RATE if preview.config.lora else 1) if large else 1e-2
        if not LOWEST_RATE <= args.learning_rate <= highest:
            wrong.append(f"{stage}.learning_rate is {args.learning_rate:g}, not in [{LOWEST_RATE:g}, {highest:g}]")
    advice = "check the exponent; DPO usually takes 5e-7 to 5e-6, LoRA 10 to 20 times as much"
    return ("; ".join(wrong), advice) if wrong else None


@_rule(WARNING)
def beta(preview: RunPreview) -> Diagnosis | None:
    dpo = preview.config.dpo
    if dpo is None:
        return None
    low, high = BETAS_OF_LOSS.get(dpo.loss, BETAS[dpo.normalization])
    if low <= dpo.beta <= high:
        return None
    return (
        f"dpo.beta is {dpo.beta:g}, not in [{low:g}, {high:g}] (dpo.loss: {dpo.loss}, on "
        f"{'means' if dpo.normalization == 'token' else 'sums'} of log-probs)",
        f"the usual value is {PREFERENCE_LOSSES[dpo.loss].beta:g}",
    )


@_rule(ERROR)
def unknown_metric(preview: RunPreview) -> Diagnosis | None:
    """Early stopping and the choice of the best checkpoint use a metric of the probes."""
    sources = {row.negative_source for row in preview.rows.get("heldout", [])[: preview.config.probes.rows]}
    metrics = [*METRICS, "cooling", *(f"cooling_bin{index}" for index in range(COOLING_BINS))]
    names = [f"{name}_{metric}" for name in ("chosen", "onpolicy", *sorted(sources)) for metric in metrics]
    wrong = []
    for stage, args in preview.stages().items():
        metric = (args.metric_for_best_model or names[0]).removeprefix("eval_")
        if sources and metric not in names:
            hint = did_you_mean(metric, names)
            wrong.append(f"{stage}.metric_for_best_model is {metric!r}, which no probe measures{hint}")
    return ("; ".join(wrong), "name a metric of the probes, such as chosen_mean_logp") if wrong else None


@_rule(WARNING)
def stop_on_never_stops(preview: RunPreview) -> Diagnosis | None:
    answers = min(len(preview.rows.get("heldout", ())), preview.config.probes.rows)
    names = {name for args in preview.stages().values() for name in args.stop_on if needs_answers(name)}
    if not names or not 0 < answers < MIN_ANSWERS:
        return None
    evidence = f"stop_on names {', '.join(sorted(names))}, and the probes have {answers} held-out answers"
    return evidence, f"raise probes.rows or add held-out rows: findings about answers need {MIN_ANSWERS}"


@_rule(ERROR)
def folder_of_another_run(preview: RunPreview) -> Diagnosis | None:
    if len(preview.digests) < 2:
        return None
    folder, config = RunFolder(preview.config.output_dir), preview.config
    try:
        identity: dict[str, object] = {"data": preview.digests}
        if folder.is_run():  # reads all images and the model
            adapter = config.lora.adapter if config.lora is not None else None
            identity = input_digests(preview.digests, preview.rows, model_path(config), adapter)
        folder.check(config, identity)
    except InputError as error:
        return str(error), "give this run its own output_dir"
    return None


@_rule(WARNING)
def short_samples(preview: RunPreview) -> Diagnosis | None:
    limit = preview.config.sampling.max_new_tokens
    lengths = [length.chosen for length in preview.all_lengths()]
    longer = sum(length > limit for length in lengths)
    if not longer > len(lengths) / 2:
        return None
    evidence = f"sampling.max_new_tokens is {limit}, and {longer} of {len(lengths)} chosen answers are longer"
    return evidence, f"raise it toward {max(lengths)}, or sampled answers and captions are cut off"


@_rule(ERROR)
def heldout_pairs_in_train(preview: RunPreview) -> Diagnosis | None:
    """Pairs with the same texts and the same image bytes, wherever the images are."""
    heldout = preview.rows.get("heldout", [])
    texts = {_texts(row) for row in heldout}
    train = {_contents(row): row for row in preview.rows.get("train", ()) if _texts(row) in texts}
    shared = [(row, train[_contents(row)]) for row in heldout if train and _contents(row) in train]
    if not shared:
        return None
    where = list_rows([f"{row.where} = {twin.where}" for row, twin in shared])
    return f"{len(shared)} pairs are in both datasets: {where}", "remove them from one of the two"


@_rule(WARNING)
def duplicate_pairs(preview: RunPreview) -> Diagnosis | None:
    train = preview.rows.get("train", [])
    counts = Counter(map(_texts, train))
    seen: set[tuple[object, ...]] = set()
    repeated = []
    for row in train:
        if counts[_texts(row)] > 1:
            contents = _contents(row)
            if contents in seen:
                repeated.append(row)
            seen.add(contents)
    if not repeated:
        return None
    return f"{len(repeated)} pairs of data.train repeat earlier ones: {list_rows(repeated)}", "remove the copies"


def _texts(row: Row) -> str:
    return json.dumps([row.prompt, row.chosen, row.rejected])


def _contents(row: Row) -> tuple[object, ...]:
    """What identifies a pair: its texts and the digests of its images. A row with an unreadable image equals no other
    row; the image is reported separately."""
    try:
        return (_texts(row), *(hashlib.sha256(image.read_bytes()).digest() for image in row.images))
    except IMAGE_ERRORS:
        return (row.where,)


@_rule(ERROR)
def rejected_is_a_reference(preview: RunPreview) -> Diagnosis | None:
    """A rejected answer that counts as right: chosen and rejected may be swapped."""
    swapped = [
        row
        for rows in preview.rows.values()
        for row in rows
        if normalize(answer_text(row.rejected)) in map(normalize, row.references)
    ]
    if not swapped:
        return None
    evidence = f"the rejected answer is among the references in {len(swapped)} rows: {list_rows(swapped)}"
    return evidence, "swap chosen and rejected if they are swapped, else remove the pairs"


@_rule(ERROR)
def exceeds_model_positions(preview: RunPreview) -> Diagnosis | None:
    limit = preview.config.data.max_length
    if preview.model is None or preview.model.positions is None:
        return None
    positions = preview.model.positions
    long = [
        f"{row.where} ({lengths[row.id].total})"
        for name, lengths in preview.lengths.items()
        for row in preview.sample[name]
        if row.id in lengths and lengths[row.id].total > positions
    ]
    if not long or (limit is not None and limit <= positions):
        return None
    evidence = f"{len(long)} rows are longer than the {positions} positions of the model: "
    return evidence + list_rows(long), f"set data.max_length to {positions} or less"


@_rule(WARNING)
def longer_than_max_length(preview: RunPreview) -> Diagnosis | None:
    limit, policy = preview.config.data.max_length, preview.config.data.over_length
    if limit is None:
        return None
    reports = [
        fit.report(f"data.{name}", limit)
        for name, fit in preview.fits.items()
        if len(fit.skipped) + len(fit.changed) > 0
    ]
    advice = f"raise data.max_length if this is unintended (data.over_length: {policy})"
    return ("; ".join(reports), advice) if reports else None


@_rule(ERROR)
def tokens_without_embedding(preview: RunPreview) -> Diagnosis | None:
    if preview.model is None or preview.collator is None or len(preview.collator.tokenizer) <= preview.model.vocab:
        return None
    tokenizer = len(preview.collator.tokenizer)
    evidence = f"the tokenizer has {tokenizer} tokens, the model has embeddings for {preview.model.vocab}"
    return evidence, "use the tokenizer that the model was saved with, or save the model with resized embeddings"


@_rule(ERROR)
def pad_token_is_image_token(preview: RunPreview) -> Diagnosis | None:
    """The model would expect an image at the padding. An end-of-sequence pad token is fine, because labels and masks
    are made from lengths."""
    if preview.meter is None:
        return None
    tokenizer = preview.meter.collator.tokenizer
    if tokenizer.pad_token_id not in preview.meter.image_ids:
        return None
    return f"the pad token {tokenizer.pad_token!r} is an image token", "set another pad_token"


@_rule(WARNING)
def length_bias(preview: RunPreview) -> Diagnosis | None:
    lengths = preview.all_lengths()
    longer = sum(length.chosen > length.rejected for length in lengths)
    chosen, rejected = (sum(column) for column in ([x.chosen for x in lengths], [x.rejected for x in lengths]))
    if not lengths or longer < LONGER_SHARE * len(lengths) or chosen < LONGER * rejected:
        return None
    evidence = (
        f"chosen answers are longer in {longer} of {len(lengths)} pairs and have {chosen / rejected:.1f} times as many "
        "tokens in total: length alone tells them apart"
    )
    return evidence, "add pairs of similar length, or train on means (dpo.normalize: token)"
