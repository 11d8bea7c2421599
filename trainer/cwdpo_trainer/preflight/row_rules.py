"""What `cwdpo check` looks for in single rows. A row counts for the first mistake that it has.

Each rule is a function of a `Plan` and a row that returns the evidence, or None where all is well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

from cwdpo_trainer.data.lengths import Length
from cwdpo_trainer.data.rows import Row, answer_text
from cwdpo_trainer.errors import InputError, describe, shorten
from cwdpo_trainer.preflight.run_rules import ERROR, PLACES, Plan, Problem

RowRule = Callable[[Plan, Row], str | None]


def unreadable_image(plan: Plan, row: Row) -> str | None:
    try:
        row.load_images()
    except InputError as error:
        return _mistake(error)
    return None


def wrong_number_of_placeholders(plan: Plan, row: Row) -> str | None:
    """Some processors put an image's token into a prompt that has none; others take any number of them, and the
    model fails in training."""
    token = getattr(plan.collator.processor, "image_token", None)
    if token is None:
        return None
    found = plan.collator.prompt_text(row).count(token)
    if found == len(row.images) or (found == 0 and _is_encoded(plan, row)):
        return None
    return f"{found} {token} in the prompt, {len(row.images)} images"


def _is_encoded(plan: Plan, row: Row) -> bool:
    """Whether the processor made places for the images."""
    try:
        return plan.meter(row).image > 0
    except ValueError:
        return False


def answer_is_no_continuation(plan: Plan, row: Row) -> str | None:
    """The chat template must render prompt and answer as the prompt's rendering and more."""
    try:
        for answer in (row.chosen, row.rejected):
            plan.collator.answer_tokens(row, answer)
    except InputError as error:
        return _mistake(error)
    return None


def mark_in_an_answer(plan: Plan, row: Row) -> str | None:
    """The end of sequence inside an answer teaches to go on after it; a token of an image asks for an image."""
    tokenizer = plan.collator.tokenizer
    for name, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
        tokens = plan.collator.answer_tokens(row, answer)[:-1]
        for token in (tokenizer.eos_token_id, *plan.meter.image_ids):
            if token in tokens:
                return f"{tokenizer.convert_ids_to_tokens(token)} in {name} {answer_text(answer)[:60]!r}"
    return None


ROW_RULES: dict[str, tuple[RowRule, str]] = {
    rule.__name__: (rule, advice)
    for rule, advice in (
        (unreadable_image, "replace the files, or leave the rows out"),
        (wrong_number_of_placeholders, "write one placeholder for each image of the row"),
        (answer_is_no_continuation, "use the model's own chat template; it may not rewrite what came before an answer"),
        (mark_in_an_answer, "take it out of the answers; the end of sequence is added by itself"),
    )
}
REFUSED = "refused_by_the_processor"


def row_problems(plan: Plan, name: str) -> Iterator[Problem]:
    """What the rules find in the sample of the data set `name`; the lengths of its good rows go into the plan."""
    found: dict[str, list[str]] = defaultdict(list)
    lengths = plan.lengths.setdefault(name, {})
    for row in plan.sample[name]:
        mistake = _first_mistake(plan, row, lengths)
        if mistake is not None:
            found[mistake[0]].append(f"{row.where}: {mistake[1]}")
    for rule, evidence in found.items():
        count = f"{len(evidence)} of {len(plan.sample[name])} rows of data.{name}"
        advice = "see the messages; the run would stop at these rows" if rule == REFUSED else ROW_RULES[rule][1]
        yield Problem(ERROR, rule, listed(count, evidence), advice)


def _first_mistake(plan: Plan, row: Row, lengths: dict[int, Length]) -> tuple[str, str] | None:
    try:
        for name, (rule, _) in ROW_RULES.items():
            evidence = rule(plan, row)
            if evidence is not None:
                return name, evidence
        lengths[row.id] = plan.meter(row)
    except Exception as error:  # whatever a processor, a template or a tokenizer raises would stop the run
        return REFUSED, describe(error)
    return None


def listed(head: str, evidence: list[str]) -> str:
    """A line, and below it the first `PLACES` pieces of evidence."""
    more = [f"and {len(evidence) - PLACES} more"] if len(evidence) > PLACES else []
    return "\n    ".join([head, *evidence[:PLACES], *more])


def _mistake(error: InputError) -> str:
    """The error without its place, which the report prints before it."""
    return shorten(f"expected {error.expected}, got {error.got}")
