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
from cwdpo_trainer.data.collator import PairCollator, Tokens, to_device
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

    Forward k scores answer k of every row. `forwards` is at least the largest number of answers to a row; processes
    that share a sharded model pass the same number.
    """
    logp: list[list[float]] = [[] for _ in rows]
    prompts = to_device(collator.prompts(rows), model.device)
    with evaluating(model):
        for index in range(forwards):
            # Rows without an answer `index` score an end of sequence, so that one batch of prompts serves all forwards.
            column = [of_row[index] if index < len(of_row) else [collator.tokenizer.eos_token_id] for of_row in answers]
            inputs, labels = collator.join(prompts, column)
            mean = model(**inputs, head_op=lambda hidden, head, labels=labels: _mean_logp(hidden, head, labels))
            for of_row, scored, value in zip(answers, logp, mean.tolist(), strict=True):
                if index < len(of_row):
                    scored.append(value)
    return logp


def _mean_logp(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    return linear_sequence_logprob(hidden, head, labels).mean
