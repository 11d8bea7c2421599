"""Answers that a model generates: samples, for on-policy negatives and their probe, and greedy captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from cwdpo_kernels.integrations.hugging_face import evaluating
from cwdpo_trainer.config.arguments import SamplingArguments
from cwdpo_trainer.data.collator import PairCollator, Tokens, to_device
from cwdpo_trainer.data.rows import Row, answer_text
from cwdpo_trainer.negatives.generation import GeneratingModel, continuations
from cwdpo_trainer.reporter import progress

Item = TypeVar("Item")
# Options of `generate` that a model's generation config must not change. One sequence goes on token by token:
_TOKEN_BY_TOKEN: dict[str, Any] = {
    "num_beams": 1, "penalty_alpha": None, "dola_layers": None, "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None, "return_dict_in_generate": False,
}  # fmt: skip
# and samples are drawn from the model's own probabilities.
_ALL_TOKENS: dict[str, Any] = {
    "top_k": 0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}  # fmt: skip


def sample_answers(
    model: GeneratingModel,
    collator: PairCollator,
    rows: Sequence[Row],
    settings: SamplingArguments,
    seed: int,
    is_sharded: bool = False,
) -> list[list[Tokens]]:
    """Sample `settings.samples` answers to each row from `model`; return the wrong ones, as tokens.

    The samples depend only on `seed`, the weights and the rows, and torch's random state is restored. So a resumed run
    draws the same answers. If the model is sharded (`is_sharded`), all processes must call this together.
    """
    # In a model whose prompts attend in both directions (PaliGemma), a prompt without its last token has other states.
    shares_prompts = collator.shares_prompts and not collator.answer_types and not is_sharded
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        drawn = _generate(
            model, collator, rows, settings.max_new_tokens, do_sample=True, temperature=settings.temperature,
            top_p=settings.top_p, **_ALL_TOKENS,
            samples=settings.samples, shares_prompts=shares_prompts, synced_gpus=is_sharded,
        )  # fmt: skip
    count = settings.samples
    return wrong_answers(collator, rows, [drawn[index * count :][:count] for index in range(len(rows))])


def wrong_answers(collator: PairCollator, rows: Sequence[Row], drawn: Sequence[Sequence[Tokens]]) -> list[list[Tokens]]:
    """The answers in `drawn` (a list per row) that can serve as negatives, trimmed to the row's `max_answer` tokens.

    Right answers are dropped: those equal to the chosen answer or a reference. Answers with special tokens, such as
    image placeholders, are dropped too, unless the chosen answer has the same token (an end of turn, say).
    """
    tokenizer = collator.tokenizer
    special = special_tokens(tokenizer) - {tokenizer.eos_token_id}
    answers = []
    for row, of_row in zip(rows, drawn, strict=True):
        right = {normalize(text) for text in (*row.references, answer_text(row.chosen))}
        texts = tokenizer.batch_decode(of_row, skip_special_tokens=True)
        (chosen,) = collator.answer_tokens(row, row.chosen)
        forbidden = special - set(chosen)
        wrong = [
            tokens[: row.max_answer]
            for tokens, text in zip(of_row, texts, strict=True)
            if normalize(text) not in right and forbidden.isdisjoint(tokens)
        ]
        answers.append([tokens for tokens in wrong if tokens != chosen])
    return answers


def caption(
    model: GeneratingModel, collator: PairCollator, rows: Sequence[Row], max_new_tokens: int, batch_size: int,
    title: str | None = None,
) -> list[str]:  # fmt: skip
    """The greedy answer to each row's prompt, as text. With a `title`, shows a progress bar."""
    texts: list[str] = []
    for batch in batched(rows, batch_size, title):
        tokens = _generate(model, collator, batch, max_new_tokens, do_sample=False)
        texts += collator.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]


def batched(rows: Sequence[Item], size: int, title: str | None = None) -> Iterator[Sequence[Item]]:
    """`rows` in slices of `size`. With a `title`, shows a progress bar that counts rows, after 2 seconds."""
    with progress(None, title or "", total=len(rows), disable=title is None, delay=2, leave=False) as bar:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            yield batch
            bar.update(len(batch))


def normalize(text: str) -> str:
    """The form in which answers are compared: lower case, words separated by single spaces."""
    return " ".join(text.lower().split())


@torch.no_grad()
def _generate(
    model: GeneratingModel,
    collator: PairCollator,
    rows: Sequence[Row],
    max_new_tokens: int,
    samples: int = 1,
    shares_prompts: bool = False,
    **options: Any,
) -> list[Tokens]:
    """Generated answers in the form of `PairCollator.answer_tokens`: nothing after the end-of-sequence token."""
    inputs = to_device(collator.prompts(rows, padding_side="left"), model.device)
    ends, pad = _end_tokens(model, collator.tokenizer), collator.tokenizer.pad_token_id
    with evaluating(model):
        outputs = continuations(
            model, inputs, samples, shares_prompts, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=pad,
            use_cache=True, **_TOKEN_BY_TOKEN, **options,
        )  # fmt: skip
    new = outputs[:, inputs["input_ids"].shape[1] :].tolist()
    return [ended(tokens, ends) for tokens in new]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}


def _end_tokens(model: GeneratingModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the end of sequence first, then the model's other special ones (such as the end of a
    turn in Gemma 3)."""
    eos = tokenizer.eos_token_id
    own = model.generation_config.eos_token_id
    others = set(own if isinstance(own, list) else [own]) & special_tokens(tokenizer)
    return [eos, *sorted(others - {eos})]


def ended(tokens: Tokens, ends: Sequence[int]) -> Tokens:
    """`tokens` up to the first end token, followed by the end of sequence, `ends[0]`. Without one: all of `tokens`."""
    first = next((index for index, token in enumerate(tokens) if token in ends), None)
    if first is None:
        return tokens
    answer = tokens[: first + 1]
    return answer if answer[-1] == ends[0] else [*answer, ends[0]]
