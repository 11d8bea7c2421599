"""Rows that a run cannot train on, found before it starts.

rows.py checks what a row says. Here its images are decoded, and its prompt, images and answers go through the processor
(with blank images of the same shapes, see lengths.py). Such a row would stop the run at some later batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cwdpo_trainer.chat_templates import TemplateLimit
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.lengths import LengthMeter
from cwdpo_trainer.data.rows import Row, answer_text, message_parts, report_bad_rows
from cwdpo_trainer.errors import InputError, describe, require
from cwdpo_trainer.files import THREADS
from cwdpo_trainer.reporter import progress

AHEAD = 256  # rows whose images are decoded at a time


def check_row(meter: LengthMeter, row: Row) -> None:
    """Raise `InputError` unless the row's images can be decoded, and the processor can take the row."""
    row.load_images()
    check_tokens(meter, row)


def is_bad(meter: LengthMeter, row: Row) -> bool:
    """Whether `check_row` fails."""
    return _error_of(partial(check_row, meter, row)) is not None


def check_tokens(meter: LengthMeter, row: Row) -> None:
    """`check_row` for a row whose images are known to be readable."""
    try:
        images = images_of_text_model(meter, row)
        require(images is None, row.where, "images", "none, because the model reads text only", images)
        problem = placeholder_mismatch(meter, row) or image_token_in_answer(meter, row)
        require(problem is None, row.where, "", "", problem)
        meter.prompt_ids(row)  # the answers were tokenized above
    except InputError:
        raise
    except Exception as error:  # processors, templates and tokenizers raise all kinds
        raise InputError(row.where, processor_name(meter), "a row that it can process", describe(error)) from error


def processor_name(meter: LengthMeter) -> str:
    return type(meter.collator.processing_class).__name__


def images_of_text_model(meter: LengthMeter, row: Row) -> str | None:
    """How many images a row for a text-only model has, or None. Image parts of messages count too."""
    if not meter.collator.is_text_only:
        return None
    parts = sum(part["type"] == "image" for part in message_parts(row.prompt))
    count = max(len(row.images), parts)
    return None if count == 0 else f"{count} image{'s' if count > 1 else ''}"


def placeholder_mismatch(meter: LengthMeter, row: Row) -> str | None:
    """What is wrong with the number of image placeholders, or None.

    Some processors add image tokens to a prompt without placeholders. Others accept any number of placeholders, and the
    model fails during training.
    """
    token = getattr(meter.collator.processor, "image_token", None)
    if token is None:
        return None
    count = meter.collator.prompt_text(row).count(token)
    if count == len(row.images) or (count == 0 and _has_image_tokens(meter, row)):
        return None
    return f"{count} {token} in the prompt, {len(row.images)} images"


def _has_image_tokens(meter: LengthMeter, row: Row) -> bool:
    try:
        return meter.measure(row).image > 0
    except ValueError:
        return False


def image_token_in_answer(meter: LengthMeter, row: Row) -> str | None:
    """An image token in an answer asks the model for an image that is not there."""
    return token_in_answer(meter, row, meter.image_ids)


def token_in_answer(meter: LengthMeter, row: Row, forbidden: Sequence[int]) -> str | None:
    """Which of the tokens `forbidden` is in which answer before its end, or None."""
    answers = {"chosen": row.chosen, "rejected": row.rejected}
    tokens = meter.collator.answer_tokens(row, *answers.values())
    for (name, answer), ids in zip(answers.items(), tokens, strict=True):
        for token in forbidden:
            if token in ids[:-1]:
                text = meter.collator.tokenizer.convert_ids_to_tokens(token)
                return f"{text} in {name} {answer_text(answer)[:60]!r}"
    return None


def bad_rows(rows: Sequence[Row], collator: PairCollator) -> dict[int, InputError]:
    """The error of each row that fails `check_row`, by the row's id. Decodes every image once, several at a time.

    Raises `InputError` about a chat template that does not come to an end.
    """
    meter = LengthMeter(collator)
    errors: dict[int, InputError] = {}
    with progress(None, "rows", total=len(rows), delay=2, leave=False) as bar, ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(rows), AHEAD):
            part = rows[start : start + AHEAD]
            for row, error in zip(part, threads.map(_image_error, part), strict=True):
                error = error or _error_of(partial(check_tokens, meter, row))
                if error is not None:
                    if isinstance(error.__cause__, TemplateLimit):
                        raise error  # each further row would take as long
                    errors[row.id] = error
                bar.update()
    return errors


def _image_error(row: Row) -> InputError | None:
    return _error_of(row.load_images)


def _error_of(work: Callable[[], object]) -> InputError | None:
    try:
        work()
    except InputError as error:
        return error
    return None


def without_bad_rows(
    name: str, rows: Sequence[Row], errors: dict[int, InputError], skipped: Callable[[str], None] | None
) -> list[Row]:
    """The rows of the source `name` without those in `errors` (`bad_rows`).

    Raises `InputError` about a bad row, or `InputErrors` about several. Given `skipped`, it leaves them out instead, if
    other rows remain, and calls `skipped` with a report.
    """
    if errors:
        report_bad_rows(name, len(rows), list(errors.values()), skipped)
    return [row for row in rows if row.id not in errors]
