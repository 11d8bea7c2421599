"""The model in training as a `pool.Policy`: it draws answers and computes their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from cwdpo_kernels import Head, linear_sequence_logprob
from cwdpo_kernels.integrations.hugging_face import evaluating
from cwdpo_trainer.config.arguments import SamplingArguments
from cwdpo_trainer.data.collator import Batch, PairCollator, SharedBatch, Tokens, to_device
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.models.distributed import is_sharded, largest
from cwdpo_trainer.negatives.sampling import sample_answers, wrong_answers
from cwdpo_trainer.negatives.server import AnswerServer


@dataclass
class PolicyInTraining:
    """A `pool.Policy`; `rows` by id. If there is a `server`, it draws the answers.

    Ranks without work run a dummy row, because forwards of a sharded model are collective.
    """

    model: PreTrainedModel
    collator: PairCollator
    rows: dict[int, Row]
    settings: SamplingArguments
    accelerator: Accelerator
    server: AnswerServer | None = None

    def draw(self, rows: Sequence[int], seed: int) -> list[list[Tokens]]:
        if self.server is not None:
            asked = [self.rows[row] for row in rows]
            return wrong_answers(self.collator, asked, self.server.draw(self.collator, asked, self.settings, seed))
        if largest(self.accelerator, len(rows)) == 0:
            return []
        sharded = is_sharded(self.accelerator)
        answers = sample_answers(self.model, self.collator, self._or_dummy(rows), self.settings, seed, sharded)
        return answers[: len(rows)]

    def mean_logp(self, rows: Sequence[int], answers: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        forwards = largest(self.accelerator, max(map(len, answers), default=0))
        if forwards == 0:
            return [[] for _ in rows]
        return answers_logp(self.model, self.collator, self._or_dummy(rows), answers or [[]], forwards)[: len(rows)]

    def _or_dummy(self, rows: Sequence[int]) -> list[Row]:
        return [self.rows[row] for row in rows] or [next(iter(self.rows.values()))]


@torch.no_grad()
def answers_logp(
    model: PreTrainedModel,
    collator: PairCollator,
    rows: Sequence[Row],
    answers: Sequence[Sequence[Tokens]],
    forwards: int,
) -> list[list[float]]:
    """The mean log-prob (nats per token) of each answer to each row under `model`, which has its head attached.

    With shared prompts one forward scores all answers. Otherwise forward k scores answer k of every row. `forwards` is
    at least the largest number of answers to a row; processes that share a sharded model pass the same number.
    """
    logp: list[list[float]] = [[] for _ in rows]
    prompts = to_device(collator.prompts(rows), model.device)
    with evaluating(model):
        for groups in _groups(answers, forwards, [collator.tokenizer.eos_token_id], collator.shares_prompts):
            batch = collator.join(prompts, *groups).to(model.device)

            def op(hidden: Tensor, head: Head, batch: Batch | SharedBatch = batch) -> Tensor:
                return linear_sequence_logprob(hidden, head, batch.labels, batch.cu_seqlens).mean

            scored = [row for group in groups for row, tokens in enumerate(group) if tokens is not None]
            for row, value in zip(scored, batch.run(model, op).tolist(), strict=True):
                logp[row].append(value)
    return [values[: len(of_row)] for values, of_row in zip(logp, answers, strict=True)]


def _groups(
    answers: Sequence[Sequence[Tokens]], count: int, stand_in: Tokens, at_once: bool
) -> list[list[list[Tokens | None]]]:
    """The groups of answers that each forward scores: all `count` groups at once, or one after the other.

    `stand_in` takes the place of answers that a row does not have, if there must be one: in a forward for one group,
    so that one batch of prompts serves all forwards, and where no row has any answer.
    """
    columns: list[list[Tokens | None]] = [
        [of_row[index] if index < len(of_row) else None for of_row in answers] for index in range(count)
    ]
    if at_once and any(answers):
        return [columns]
    filled: list[list[Tokens | None]] = [
        [stand_in if tokens is None else tokens for tokens in column] for column in columns
    ]
    return [filled] if at_once else [[column] for column in filled]
