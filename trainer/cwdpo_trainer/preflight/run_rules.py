"""What `cwdpo check` looks for in a run as a whole: rules about its settings and about its data sets.

Each rule is a function of a `Plan` that returns (evidence, advice), or None where all is well; one that has not what it
needs to judge (the model could not be read, say) returns None too, and what was missing is a problem of its own.
An `error` stops a run, or makes it learn something else than it should; a `warning` is a reason to look. Rules about
single rows are in row_checks.py.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from cwdpo_trainer.config.arguments import StageArguments
from cwdpo_trainer.config.loader import STAGES, RunConfig
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.images import IMAGE_ERRORS
from cwdpo_trainer.data.lengths import Fit, Length, LengthMeter
from cwdpo_trainer.data.rows import Row, answer_text
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.evaluation.probes import COOLING_BINS, METRICS
from cwdpo_trainer.negatives.sampling import normalise
from cwdpo_trainer.run_folder import RunFolder

ERROR, WARNING = "error", "warning"
PLACES = 5  # that a problem quotes
LARGE_MODEL = 100_000_000  # parameters; below it people train from scratch, with any rate
# Published full finetunings of vision-language models: SFT at 1e-6 to 2e-5, DPO at 5e-7 to 5e-6; LoRA at ten to twenty
# times these. Above the upper end by ten, training mostly diverges.
HIGHEST_RATE = {"sft": 2e-4, "dpo": 5e-5}
LORA_RATE = 20
LOWEST_RATE = 1e-8  # of a step of AdamW: bfloat16 weights do not move
BETAS = {"sequence": (0.01, 1.0), "token": (0.1, 20.0)}  # of DPO on sums, and of losses on means (SimPO: 2 to 10)
LONGER = 1.5  # times as many tokens in chosen answers as in rejected ones
LONGER_SHARE = 0.8  # of the pairs

Diagnosis = tuple[str, str]


@dataclass(frozen=True)
class Problem:
    """What the rule `name` found: `severity` ERROR or WARNING, the evidence, and what to do."""

    severity: str
    name: str
    evidence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity} {self.name}: {self.evidence}\n  -> {self.advice}"


@dataclass(frozen=True)
class ModelFacts:
    """A model as its configuration describes it: `vocab` x `dim` of the head, `positions` it was made for (None:
    any number), `dtype` that its weights are loaded in, number of `parameters`."""

    name: str
    vocab: int
    dim: int
    positions: int | None
    dtype: torch.dtype
    parameters: int


@dataclass
class Plan:
    """What a run would start from, as far as it can be read. Dictionaries have the keys `train` and `heldout`.

    `unused`: columns that are not read. `sample`: the rows that were looked at one by one; `lengths` of those that
    are good, by row id; `fits`: what becomes of these under data.max_length, if it is set.
    """

    config: RunConfig
    digests: dict[str, str] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    sample: dict[str, list[Row]] = field(default_factory=dict)
    collator: PairCollator | None = None
    meter: LengthMeter | None = None
    lengths: dict[str, dict[int, Length]] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    model: ModelFacts | None = None

    def stages(self) -> dict[str, StageArguments]:
        found = {name: getattr(self.config, name) for name in STAGES}
        return {name: args for name, args in found.items() if args is not None}

    def all_lengths(self) -> list[Length]:
        return [length for of_set in self.lengths.values() for length in of_set.values()]


Rule = Callable[[Plan], Diagnosis | None]
_RULES: dict[str, tuple[str, Rule]] = {}


def _rule(severity: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        _RULES[function.__name__] = severity, function
        return function

    return register


def problems_of(plan: Plan) -> Iterator[Problem]:
    """What the rules of this file find."""
    for name, (severity, rule) in _RULES.items():
        diagnosis = rule(plan)
        if diagnosis is not None:
            yield Problem(severity, name, *diagnosis)


def places(rows: Sequence[Row | str]) -> str:
    """Where rows are: the first `PLACES` of them, and how many there are more."""
    shown = [row if isinstance(row, str) else row.where for row in rows[:PLACES]]
    more = len(rows) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


@_rule(ERROR)
def nothing_in_a_batch(plan: Plan) -> Diagnosis | None:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    wrong = [f"{stage}.{name} is {getattr(args, name)}" for stage, args in plan.stages().items() for name in names
             if getattr(args, name) < 1]  # fmt: skip
    return ("; ".join(wrong), "set it to 1 or more") if wrong else None


@_rule(ERROR)
def float16_weights(plan: Plan) -> Diagnosis | None:
    """Gradient scaling needs float32 weights, and updates below 6e-8 are lost in float16."""
    if plan.model is None or plan.model.dtype != torch.float16:
        return None
    origin = "as model.dtype says" if plan.config.model.dtype == "float16" else "which is how the model was saved"
    return f"the weights would be trained in float16, {origin}", "set model.dtype to bfloat16 or float32"


@_rule(WARNING)
def learning_rate(plan: Plan) -> Diagnosis | None:
    large = plan.model is not None and plan.model.parameters >= LARGE_MODEL
    wrong = []
    for stage, args in plan.stages().items():
        highest = HIGHEST_RATE[stage] * (LORA_RATE if plan.config.lora else 1) if large else 1e-2
        if not LOWEST_RATE <= args.learning_rate <= highest:
            wrong.append(f"{stage}.learning_rate is {args.learning_rate:g}, not in [{LOWEST_RATE:g}, {highest:g}]")
    advice = "see whether a digit is wrong; DPO is usual with 5e-7 to 5e-6, with LoRA ten to twenty times as much"
    return ("; ".join(wrong), advice) if wrong else None


@_rule(WARNING)
def beta(plan: Plan) -> Diagnosis | None:
    dpo = plan.config.dpo
    if dpo is None:
        return None
    low, high = BETAS[dpo.normalize]
    if low <= dpo.beta <= high:
        return None
    return f"dpo.beta is {dpo.beta:g}, not in [{low:g}, {high:g}] (dpo.normalize: {dpo.normalize})", "0.1 is usual"


@_rule(ERROR)
def unknown_metric(plan: Plan) -> Diagnosis | None:
    """Early stopping and the choice of the best checkpoint go by a figure of the probes."""
    sources = {row.negative_source for row in plan.rows.get("heldout", [])[: plan.config.probes.rows]}
    figures = [*METRICS, "cooling", *(f"cooling_bin{place}" for place in range(COOLING_BINS))]
    names = [f"{name}_{figure}" for name in ("chosen", "onpolicy", *sorted(sources)) for figure in figures]
    wrong = []
    for stage, args in plan.stages().items():
        metric = (args.metric_for_best_model or names[0]).removeprefix("eval_")
        if sources and metric not in names:
            close = difflib.get_close_matches(metric, names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            wrong.append(f"{stage}.metric_for_best_model is {metric!r}, which no probe measures{hint}")
    return ("; ".join(wrong), "name a probe's figure, such as chosen_mean_logp") if wrong else None


@_rule(ERROR)
def folder_of_another_run(plan: Plan) -> Diagnosis | None:
    if len(plan.digests) < 2:
        return None
    try:
        RunFolder(plan.config.output_dir).check(plan.config, plan.digests)
    except InputError as error:
        return str(error), "give this run an output_dir of its own"
    return None


@_rule(WARNING)
def short_samples(plan: Plan) -> Diagnosis | None:
    limit = plan.config.sampling.max_new_tokens
    lengths = [length.chosen for length in plan.all_lengths()]
    longer = sum(length > limit for length in lengths)
    if not longer > len(lengths) / 2:
        return None
    evidence = f"sampling.max_new_tokens is {limit}, and {longer} of {len(lengths)} chosen answers are longer"
    return evidence, f"raise it towards {max(lengths)}, or drawn answers and captions end in the middle"


@_rule(ERROR)
def train_and_heldout_share_pairs(plan: Plan) -> Diagnosis | None:
    """Same texts, and images of the same content: copies in another folder count."""
    heldout = plan.rows.get("heldout", [])
    texts = {_texts(row) for row in heldout}
    train = {_contents(row): row for row in plan.rows.get("train", ()) if _texts(row) in texts}
    shared = [(row, train[_contents(row)]) for row in heldout if train and _contents(row) in train]
    if not shared:
        return None
    where = places([f"{row.where} = {twin.where}" for row, twin in shared])
    return f"{len(shared)} pairs are in both data sets: {where}", "take them out of one of the two"


@_rule(WARNING)
def repeated_pairs(plan: Plan) -> Diagnosis | None:
    train = plan.rows.get("train", [])
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
    return f"{len(repeated)} pairs of data.train are there before: {places(repeated)}", "take the copies out"


def _texts(row: Row) -> str:
    return json.dumps([row.prompt, row.chosen, row.rejected])


def _contents(row: Row) -> tuple[object, ...]:
    """What a pair is: its texts and its images' bytes. A row with an unreadable image, which is a problem of its own,
    is equal to none."""
    try:
        return (_texts(row), *(hashlib.sha256(picture.read_bytes()).digest() for picture in row.images))
    except IMAGE_ERRORS:
        return (row.where,)


@_rule(ERROR)
def rejected_is_right(plan: Plan) -> Diagnosis | None:
    """The rejected answer is among the references: chosen and rejected may be swapped, or the negative is none."""
    swapped = [
        row
        for rows in plan.rows.values()
        for row in rows
        if normalise(answer_text(row.rejected)) in map(normalise, row.references)
    ]
    if not swapped:
        return None
    evidence = f"the rejected answers of {len(swapped)} rows are among their references: {places(swapped)}"
    return evidence, "see whether chosen and rejected are swapped; else leave the pairs out"


@_rule(ERROR)
def longer_than_the_model(plan: Plan) -> Diagnosis | None:
    limit = plan.config.data.max_length
    if plan.model is None or plan.model.positions is None:
        return None
    positions = plan.model.positions
    long = [
        f"{row.where} ({lengths[row.id].total})"
        for name, lengths in plan.lengths.items()
        for row in plan.sample[name]
        if row.id in lengths and lengths[row.id].total > positions
    ]
    if not long or (limit is not None and limit <= positions):
        return None
    evidence = f"{len(long)} rows have more than the {positions} tokens that the model has positions for: "
    return evidence + places(long), f"set data.max_length to {positions} or less"


@_rule(WARNING)
def longer_than_max_length(plan: Plan) -> Diagnosis | None:
    limit, policy = plan.config.data.max_length, plan.config.data.over_length
    reports = [
        fit.report(f"data.{name}", limit) for name, fit in plan.fits.items() if len(fit.skipped) + len(fit.changed) > 0
    ]
    advice = f"fine if that is meant (data.over_length: {policy}); else raise data.max_length"
    return ("; ".join(reports), advice) if reports else None


@_rule(ERROR)
def tokens_without_embedding(plan: Plan) -> Diagnosis | None:
    if plan.model is None or plan.collator is None or len(plan.collator.tokenizer) <= plan.model.vocab:
        return None
    tokenizer = len(plan.collator.tokenizer)
    evidence = f"the tokenizer has {tokenizer} tokens, the model embeddings for {plan.model.vocab}"
    return evidence, "use the tokenizer that the model was saved with, or resize the model's embeddings and save it"


@_rule(ERROR)
def padding_is_an_image_token(plan: Plan) -> Diagnosis | None:
    """Padding the model would take for a place of an image. That padding is the end of sequence does no harm here:
    labels and masks are made from lengths."""
    if plan.collator is None or plan.collator.tokenizer.pad_token_id not in plan.meter.image_ids:
        return None
    return f"the tokenizer pads with {plan.collator.tokenizer.pad_token!r}, an image's token", "set another pad_token"


@_rule(WARNING)
def chosen_is_longer(plan: Plan) -> Diagnosis | None:
    lengths = plan.all_lengths()
    longer = sum(length.chosen > length.rejected for length in lengths)
    chosen, rejected = (sum(column) for column in ([x.chosen for x in lengths], [x.rejected for x in lengths]))
    if not lengths or longer < LONGER_SHARE * len(lengths) or chosen < LONGER * rejected:
        return None
    evidence = (
        f"chosen answers are longer in {longer} of {len(lengths)} pairs, {chosen / rejected:.1f} times on the whole: "
        "length alone tells the two apart"
    )
    return evidence, "add pairs of like length, or train on means (dpo.normalize: token)"
