"""Turns rows into model inputs, in two steps, because a pair's negative may change in between.

`PairCollator` runs the processor on the prompts and tokenizes the answers as they stand after their prompts, because
SentencePiece tokenizers give other tokens to an answer alone ("_a _red" instead of "a _red"). `with_answers` joins
prompts and answers into one padded batch with aligned labels. Training calls it inside the step, after on-policy
negatives are mixed in: a data loader prefetches batches, and would have to sample them from a policy that is out of
date.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from cwdpo_kernels import IGNORE_INDEX, Head, shift_labels
from cwdpo_kernels.integrations.shared_prefix import TreeBatch, tree_batch
from cwdpo_trainer.chat_templates import render
from cwdpo_trainer.data.rows import Row, answer_text
from cwdpo_trainer.errors import require
from cwdpo_trainer.reporter import say
from cwdpo_trainer.text_processor import TextProcessor

Tokens = list[int]
Answer = str | list[dict[str, Any]]  # text, or an assistant message
TAIL = 24  # characters of a prompt, at least, that an answer is tokenized with
# Texts to tokenize an answer after, where it shares a token with its prompt. The last one always works.
ANCHORS = ("\n", ".", "a", " ", "0", "")


class Batch(NamedTuple):
    """S answers, each with its prompt in front of it: `inputs` of the model, padded, and `labels` [S, T] aligned with
    the hidden states that predict them."""

    inputs: dict[str, Tensor]
    labels: Tensor

    @property
    def cu_seqlens(self) -> None:
        """Labels are padded, not packed."""
        return None

    def run(self, model: nn.Module, op: Callable[[Tensor, Head], Any]) -> Any:
        """The result of `op(hidden, head)` inside the forward of `model`; `hidden` is aligned with `labels`."""
        return model(**self.inputs, head_op=op)

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        return Batch(to_device(self.inputs, device), self.labels.to(device))


class SharedBatch(NamedTuple):
    """S answers on one token axis, with each prompt once. It has the methods of `Batch`."""

    tree: TreeBatch

    @property
    def labels(self) -> Tensor:
        """The labels [N] of all answers."""
        return self.tree.labels

    @property
    def cu_seqlens(self) -> Tensor:
        """The bounds [S + 1] of the answers in the labels."""
        return self.tree.cu_seqlens

    def run(self, model: nn.Module, op: Callable[[Tensor, Head], Any]) -> Any:
        """The result of `op(hidden, head)` inside the forward of `model`; `hidden` is aligned with `labels`."""
        return self.tree.run(model, op)

    def to(self, device: torch.device) -> SharedBatch:
        """The batch with its tensors on `device`."""
        inputs, tree, *tensors = self.tree
        return SharedBatch(TreeBatch(to_device(inputs, device), tree, *(each.to(device) for each in tensors)))


class _Placed(NamedTuple):
    """The text of an answer to a row, and the end of the prompt before it."""

    row: Row
    prompt: str
    text: str


class Notice:
    """A message that is printed once."""

    def __init__(self) -> None:
        self.is_said = False

    def say(self, text: str) -> None:
        if not self.is_said:
            self.is_said = True
            say(text)


class PairCollator:
    """Collates P rows to {"prompts": the processor's outputs, "rows": ids, "chosen", "rejected": P token lists}.

    `processor`: that of a vision-language model, or the tokenizer of a text-only one, whose rows have no images.
    """

    def __init__(self, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
        self.processing_class = processor  # what is saved with the model
        self.processor: Any = processor
        if isinstance(processor, PreTrainedTokenizerBase):
            self.processor = TextProcessor(processor)
        self.tokenizer: Any = self.processor.tokenizer
        # PaliGemma's processor takes the answer as a suffix, gives it token type 1, and makes labels of that type's
        # tokens. Tokens of type 0 attend to both sides, so answers must have type 1.
        takes_suffix = {"token_type_ids", "labels"} <= set(self.processor.model_input_names)
        self.answer_types = {"token_type_ids": 1} if takes_suffix else {}
        self.prompt_end = "\n" if takes_suffix else ""  # PaliGemma's processor adds it to the prompt
        self.merge_notice = Notice()
        self.tree_model: nn.Module | None = None  # see `on_trees`
        for name in ("eos_token_id", "pad_token_id"):
            require(getattr(self.tokenizer, name) is not None, "processor", f"tokenizer.{name}", "a token id", None)

    @property
    def is_text_only(self) -> bool:
        """Whether there is a tokenizer only, so that rows cannot have images."""
        return isinstance(self.processor, TextProcessor)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        prompts = self.prompts(rows)
        answers = self._tokenize([placed for row in rows for placed in self._placed(row, row.chosen, row.rejected)])
        return {
            "prompts": prompts,
            "rows": [row.id for row in rows],
            "chosen": answers[::2],
            "rejected": answers[1::2],
        }

    def prompts(self, rows: Sequence[Row], padding_side: str = "right") -> dict[str, Tensor]:
        """The processor's outputs for the rows' prompts. Generation needs `padding_side` "left"."""
        texts = [self.prompt_text(row) for row in rows]
        images = [row.load_images() for row in rows]
        # A chat template has already written the special tokens.
        chat = isinstance(rows[0].prompt, list)
        outputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            text_kwargs={"padding": True, "padding_side": padding_side, "add_special_tokens": not chat},
            return_tensors="pt",
        )
        return {name: value for name, value in outputs.items() if name != "labels"}  # PaliGemma's, for its suffix

    def on_trees(self, model: nn.Module) -> PairCollator:
        """A collator whose `join` shares prompts, for `model` and its copies."""
        shared = copy.copy(self)
        shared.tree_model = model
        return shared

    @property
    def shares_prompts(self) -> bool:
        return self.tree_model is not None

    def join(self, prompts: dict[str, Tensor], *answers: Sequence[Tokens | None]) -> Batch | SharedBatch:
        """Append groups of P answers to the outputs of P `prompts`, on trees if the collator is for them, else padded.

        On trees, None stands for an answer that a prompt does not have in a group.
        """
        if self.tree_model is None:
            return self.join_padded(prompts, *answers)  # type: ignore[arg-type]  # no None, as its caller knows
        return SharedBatch(tree_batch(self.tree_model, prompts, answers, self.answer_types))

    def join_padded(self, prompts: dict[str, Tensor], *answers: Sequence[Tokens]) -> Batch:
        """Append answers to the outputs of `prompts`: see `with_answers`."""
        return with_answers(prompts, *answers, pad_id=self.tokenizer.pad_token_id, answer_types=self.answer_types)

    def answer_tokens(self, row: Row, *answers: Answer) -> list[Tokens]:
        """The tokens that the model should generate after the row's prompt, for each answer: those that follow the
        prompt's in the tokens of prompt and answer, and the end-of-sequence token.

        They are cut to the row's `max_answer`, if it is set; a cut answer has no end-of-sequence token. Raises
        `InputError` if the chat template does not render prompt and answer as the rendered prompt plus an answer.
        """
        return self._tokenize(self._placed(row, *answers))

    def _placed(self, row: Row, *answers: Answer) -> list[_Placed]:
        """The texts of the answers, each with the end of the prompt before it."""
        prompt = self.prompt_text(row)
        tail = _tail(prompt + self.prompt_end)
        if isinstance(row.prompt, str):
            return [_Placed(row, tail, answer_text(answer)) for answer in answers]
        placed = []
        for answer in answers:
            messages = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
            full = render(self.processor, row.where, row.prompt + messages)
            expected = f"prompt and answer to start with the rendered prompt {prompt!r}"
            require(full.startswith(prompt), row.where, "chat template", expected, repr(full))
            placed.append(_Placed(row, tail, full[len(prompt) :].rstrip()))
        return placed

    def _tokenize(self, answers: Sequence[_Placed]) -> list[Tokens]:
        """`answer_tokens` for answers of any rows.

        A token may cross the boundary (" " + "a" gives "_a"). The model generates after the prompt's own tokens, so
        these stay as they are, and the answer is tokenized after another text that it shares no token with.
        """
        found: dict[int, Tokens] = {}
        for anchor in (None, *ANCHORS):
            left = [(i, answer) for i, answer in enumerate(answers) if i not in found]
            if not left:
                break
            befores = [answer.prompt if anchor is None else anchor for _, answer in left]
            wholes = [before + answer.text for before, (_, answer) in zip(befores, left, strict=True)]
            tokens = self._tokens([*befores, *wholes])
            for (i, answer), before, whole in zip(left, befores, wholes, strict=True):
                own, joined = tokens[before], tokens[whole]
                if joined[: len(own)] == own:
                    found[i] = joined[len(own) :]
                elif anchor is None:
                    self._say_merged(answer, own, joined)
        return [self._ended(found[i], answer.row.max_answer) for i, answer in enumerate(answers)]

    def _ended(self, tokens: Tokens, limit: int | None) -> Tokens:
        eos = self.tokenizer.eos_token_id
        return (tokens if tokens[-1:] == [eos] else [*tokens, eos])[:limit]

    def _say_merged(self, answer: _Placed, own: Tokens, joined: Tokens) -> None:
        merged = next((token for token, before in zip(joined, own, strict=False) if token != before), None)
        if merged == self.tokenizer.unk_token_id:  # the text joined at the boundary was no word to train on
            return
        self.merge_notice.say(
            f"{answer.row.where}: the end of the prompt {answer.prompt[-20:]!r} and the start of the answer "
            f"{answer.text[:20]!r} share a token. It is split there, because the model generates after the prompt's "
            "own tokens. To avoid this, move spaces from the ends of prompts to the starts of answers (further rows "
            "are not listed)"
        )

    def _tokens(self, texts: Iterable[str]) -> dict[str, Tokens]:
        """The tokens of each text, from one call, because a call takes as long as a short text."""
        distinct = list(dict.fromkeys(texts))
        encoded = self.tokenizer(distinct, add_special_tokens=False)
        return dict(zip(distinct, encoded["input_ids"], strict=True))

    def prompt_text(self, row: Row) -> str:
        """The prompt as text: a text prompt as it is, messages as the chat template renders them."""
        if isinstance(row.prompt, str):
            return row.prompt
        return render(self.processor, row.where, row.prompt, add_generation_prompt=True)


def _tail(prompt: str) -> str:
    """The end of a prompt, from a space or newline on: what an answer's tokens may depend on. The whole prompt would
    take several times as long."""
    return prompt[max(prompt.rfind(" ", 0, -TAIL), prompt.rfind("\n", 0, -TAIL), 0) :]


def with_answers(
    prompts: dict[str, Tensor],
    *answers: Sequence[Tokens],
    pad_id: int,
    answer_types: Mapping[str, int] = MappingProxyType({}),
) -> Batch:
    """Append answers to P prompts. k lists of P answers give a batch of k P sequences, list after list.

    Padding is removed from the prompts, and sequences are padded on the right with `pad_id`. Other outputs with the
    shape of `input_ids` (masks, token types) are extended over the answers: by 1 in the attention mask, by
    `answer_types[name]` or else 0 in the others. All remaining outputs (pixel_values, image_grid_thw, ...) are
    repeated k times. Labels are the answers' tokens, and `IGNORE_INDEX` everywhere else.
    """
    ids, mask = prompts["input_ids"], prompts["attention_mask"].bool()
    rows = [(row, tokens) for group in answers for row, tokens in enumerate(group)]
    lengths = mask.sum(dim=1).tolist()
    width = max(lengths[row] + len(tokens) for row, tokens in rows)
    labels = ids.new_full((len(rows), width), IGNORE_INDEX)
    inputs: dict[str, Tensor] = {}
    for key, value in prompts.items():
        if value.shape != ids.shape:
            inputs[key] = value.repeat(len(answers), *(1,) * (value.dim() - 1))
            continue
        inputs[key] = value.new_full((len(rows), width), pad_id if key == "input_ids" else 0)
        for index, (row, _) in enumerate(rows):
            inputs[key][index, : lengths[row]] = value[row, mask[row]]
    for index, (row, tokens) in enumerate(rows):
        span = slice(lengths[row], lengths[row] + len(tokens))
        inputs["input_ids"][index, span] = labels[index, span] = ids.new_tensor(tokens)
        for key, mark in {"attention_mask": 1, **answer_types}.items():
            inputs[key][index, span] = mark
    return Batch(inputs, shift_labels(labels))


def to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """`inputs` with their tensors moved to `device`."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
