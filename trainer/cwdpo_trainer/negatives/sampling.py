"""The model's own answers: sampled ones, for on-policy negatives and their probe, and greedy captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cwdpo_trainer.config.arguments import SamplingArguments
from cwdpo_trainer.data.collator import PairCollator, Tokens, to_device
from cwdpo_trainer.data.rows import Row, answer_text

Item = TypeVar("Item")


def sample_answers(
    model: PreTrainedModel,
    collator: PairCollator,
    rows: Sequence[Row],
    settings: SamplingArguments,
    seed: int,
    is_sharded: bool = False,
) -> list[list[Tokens]]:
    """For each row `settings.samples` answers that `model` draws, as tokens, less the right ones.

    The draw depends on `seed`, the weights and the rows only, and leaves torch's random state as it was: a
    training run that is stopped and resumed draws the same. All processes draw together where the model is sharded.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        drawn = _generate(
            model, collator, rows, settings.max_new_tokens, do_sample=True, temperature=settings.temperature,
            top_p=settings.top_p, top_k=0, repetition_penalty=1.0,  # the policy's own distribution
            num_return_sequences=settings.samples, synced_gpus=is_sharded,
        )  # fmt: skip
    count = settings.samples
    return wrong_answers(collator, rows, [drawn[place * count :][:count] for place in range(len(rows))])


def wrong_answers(collator: PairCollator, rows: Sequence[Row], drawn: Sequence[Sequence[Tokens]]) -> list[list[Tokens]]:
    """Of the answers `drawn` for each row those that can be its negatives, at most as long as its own answers."""
    tokenizer = collator.tokenizer
    # A placeholder of an image, or another mark of the format, cannot be part of an answer, unless the row's own
    # answer has it (the end of a turn, say).
    marks = special_tokens(tokenizer) - {tokenizer.eos_token_id}
    answers = []
    for row, of_row in zip(rows, drawn, strict=True):
        right = {normalise(text) for text in (*row.references, answer_text(row.chosen))}
        texts = tokenizer.batch_decode(of_row, skip_special_tokens=True)
        chosen = collator.answer_tokens(row, row.chosen)
        strange = marks - set(chosen)
        wrong = [
            tokens[: row.max_answer]  # as the row's own answers
            for tokens, text in zip(of_row, texts, strict=True)
            if normalise(text) not in right and strange.isdisjoint(tokens)
        ]
        answers.append([tokens for tokens in wrong if tokens != chosen])
    return answers


def caption(
    model: PreTrainedModel, collator: PairCollator, rows: Sequence[Row], max_new_tokens: int, batch_size: int,
    title: str | None = None,
) -> list[str]:  # fmt: skip
    """The greedy answer to each row's prompt, as text; with a `title` under a progress bar."""
    texts: list[str] = []
    for batch in batched(rows, batch_size, title):
        tokens = _generate(model, collator, batch, max_new_tokens, do_sample=False)
        texts += collator.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def batched(rows: Sequence[Item], size: int, title: str | None = None) -> Iterator[Sequence[Item]]:
    """`rows` in slices of `size`; with a `title` under a progress bar that counts rows."""
    with tqdm(total=len(rows), desc=title, disable=title is None, dynamic_ncols=True, leave=False) as bar:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            yield batch
            bar.update(len(batch))


def normalise(text: str) -> str:
    """Lower case, words separated by one space: how answers are compared."""
    return " ".join(text.lower().split())


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    collator: PairCollator,
    rows: Sequence[Row],
    max_new_tokens: int,
    **options: object,
) -> list[Tokens]:
    """Generated tokens as `PairCollator.answer_tokens` writes answers: up to their end, and the end of sequence."""
    inputs = to_device(collator.prompts(rows, padding_side="left"), model.device)
    ends, pad = _ends(model, collator.tokenizer), collator.tokenizer.pad_token_id
    was_training = model.training
    model.eval()
    outputs = model.generate(
        **inputs, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad, use_cache=True, **options
    )
    model.train(was_training)
    new = outputs[:, inputs["input_ids"].shape[1] :].tolist()
    return [ended(tokens, ends) for tokens in new]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the end of sequence first, then those marks that the model takes for one (the end of
    a turn in Gemma 3, say)."""
    eos = tokenizer.eos_token_id
    own = model.generation_config.eos_token_id
    others = set(own if isinstance(own, list) else [own]) & special_tokens(tokenizer)
    return [eos, *sorted(others - {eos})]


def ended(tokens: Tokens, ends: Sequence[int]) -> Tokens:
    """`tokens` up to the first of `ends`, with the first of `ends` (end of sequence) last; all of them without one."""
    places = [place for place, token in enumerate(tokens) if token in ends]
    if not places:
        return tokens
    answer = tokens[: places[0] + 1]
    return answer if answer[-1] == ends[0] else [*answer, ends[0]]
