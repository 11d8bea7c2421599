"""Checks of single rows for `cwdpo check`. Only the first mistake of a row counts.

A rule is a function of a `LengthMeter`, which holds the processor, and a row. It returns the evidence of a mistake, or
None.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from cwdpo_trainer.chat_templates import TemplateLimit
from cwdpo_trainer.data.lengths import LengthMeter
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.data.screening import images_of_text_model, is_bad, placeholder_mismatch, token_in_answer
from cwdpo_trainer.errors import InputError, describe, shorten
from cwdpo_trainer.preflight.run_rules import ERROR, EVIDENCE_SHOWN, WARNING, Problem, RunPreview

RowRule = Callable[[LengthMeter, Row], str | None]


def unreadable_image(meter: LengthMeter, row: Row) -> str | None:
    try:
        row.load_images()
    except InputError as error:
        return shorten(error.mismatch)
    return None


def image_for_text_model(meter: LengthMeter, row: Row) -> str | None:
    """A text-only model has a tokenizer and no image processor."""
    images = images_of_text_model(meter, row)
    return None if images is None else f"{images}, but the model reads text only"


def placeholder_count(meter: LengthMeter, row: Row) -> str | None:
    return placeholder_mismatch(meter, row)


def template_changes_prompt(meter: LengthMeter, row: Row) -> str | None:
    """Rendered with an answer, the chat template must begin with what it renders for the prompt alone."""
    try:
        meter.collator.answer_tokens(row, row.chosen, row.rejected)
    except InputError as error:
        return shorten(error.mismatch)
    return None


def special_token_in_answer(meter: LengthMeter, row: Row) -> str | None:
    """An end-of-sequence token inside an answer teaches the model to continue after it. An image token asks for an
    image."""
    return token_in_answer(meter, row, (meter.collator.tokenizer.eos_token_id, *meter.image_ids))


def doubled_special_token(meter: LengthMeter, row: Row) -> str | None:
    """The tokenizer adds a token at the start that the prompt has already: the model has never seen two of them."""
    tokenizer, ids = meter.collator.tokenizer, meter.prompt_ids(row)
    starts = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    for index, (one, other) in enumerate(itertools.pairwise(ids)):
        is_start = one in starts or (index == 0 and one in tokenizer.all_special_ids and one not in meter.image_ids)
        if one == other and is_start:
            token = tokenizer.convert_ids_to_tokens(one)
            return f"the prompt's tokens have {token} {token} at {index}"
    return None


def same_tokens(meter: LengthMeter, row: Row) -> str | None:
    """Texts that differ, in spaces or in words that the tokenizer does not know, but not for the model."""
    chosen, rejected = meter.collator.answer_tokens(row, row.chosen, row.rejected)
    if chosen != rejected or row.max_answer is not None:
        return None
    tokens = shorten(" ".join(meter.collator.tokenizer.convert_ids_to_tokens(chosen)), 120)
    return f"chosen and rejected are the same {len(chosen)} tokens: {tokens}"


ROW_RULES: dict[str, tuple[RowRule, str]] = {
    rule.__name__: (rule, advice)
    for rule, advice in (
        (unreadable_image, "replace these files or remove the rows"),
        (image_for_text_model, "remove the images, or train a vision-language model"),
        (placeholder_count, "write one placeholder for each image of the row"),
        (
            template_changes_prompt,
            "use a chat template that leaves earlier messages as they are when an answer follows",
        ),
        (special_token_in_answer, "remove the token; the end-of-sequence token is appended automatically"),
        (doubled_special_token, "remove the token from the prompts, because the tokenizer adds it"),
        (same_tokens, "remove these pairs: the model cannot tell their answers apart"),
    )
}
PROCESSOR_ERROR = "processor_error"


def row_problems(preview: RunPreview, meter: LengthMeter, name: str) -> Iterator[Problem]:
    """Apply the rules to the sample of the dataset `name`. Stores the lengths of rows without mistakes in `preview`.

    With data.skip_bad_rows, a row that the run skips is a warning.
    """
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    lengths = preview.lengths.setdefault(name, {})
    for row in preview.sample[name]:
        is_limit = False
        try:
            mistake = _first_mistake(meter, row)
            if mistake is None:
                lengths[row.id] = meter(row)
        except InputError as error:
            mistake = PROCESSOR_ERROR, f"{error.what}: {shorten(error.mismatch)}"
            is_limit = isinstance(error.__cause__, TemplateLimit)
        except Exception as error:  # processors and tokenizers raise all kinds
            mistake = PROCESSOR_ERROR, describe(error)
        if mistake is not None:
            rule, evidence = mistake
            is_skipped = preview.config.data.skip_bad_rows and not is_limit and is_bad(meter, row)
            found[rule, WARNING if is_skipped else ERROR].append(f"{row.where}: {evidence}")
        if is_limit:  # each further row would take as long
            break
    for (rule, severity), lines in found.items():
        summary = f"{len(lines)} of {len(preview.sample[name])} rows of data.{name}"
        advice = "correct or remove these rows" if rule == PROCESSOR_ERROR else ROW_RULES[rule][1]
        skips = "data.skip_bad_rows is set: the run skips them" if severity == WARNING else advice
        yield Problem(severity, rule, list_evidence(summary, lines), skips)


def _first_mistake(meter: LengthMeter, row: Row) -> tuple[str, str] | None:
    """The name of the first rule that the row breaks, and the evidence."""
    for name, (rule, _) in ROW_RULES.items():
        evidence = rule(meter, row)
        if evidence is not None:
            return name, evidence
    return None


def list_evidence(summary: str, evidence: Sequence[str]) -> str:
    """The summary, and below it the first `EVIDENCE_SHOWN` pieces of evidence."""
    more = [f"and {len(evidence) - EVIDENCE_SHOWN} more"] if len(evidence) > EVIDENCE_SHOWN else []
    return "\n    ".join([summary, *evidence[:EVIDENCE_SHOWN], *more])
