"""The model in training as what the on-policy pool asks: to answer, and how likely answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from cwdpo_kernels import Head, linear_sequence_logprob
from cwdpo_trainer.config.arguments import SamplingArguments
from cwdpo_trainer.data.collator import PairCollator, Tokens, to_device
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.models.distributed import is_sharded, largest
from cwdpo_trainer.negatives.sampling import sample_answers, wrong_answers
from cwdpo_trainer.negatives.server import AnswerServer


@dataclass
class PolicyInTraining:
    """An `onpolicy.Policy`; `rows` by id.

    A sharded model's forward takes all processes: one that has nothing to ask takes part with some row.
    """

    model: PreTrainedModel
    collator: PairCollator
    rows: dict[int, Row]
    settings: SamplingArguments
    accelerator: Accelerator
    server: AnswerServer | None = None  # draws in the model's place

    def draw(self, rows: Sequence[int], seed: int) -> list[list[Tokens]]:
        if self.server is not None:
            asked = [self.rows[row] for row in rows]
            return wrong_answers(self.collator, asked, self.server.draw(self.collator, asked, self.settings, seed))
        if largest(self.accelerator, len(rows)) == 0:
            return []
        sharded = is_sharded(self.accelerator)
        return sample_answers(self.model, self.collator, self._some(rows), self.settings, seed, sharded)[: len(rows)]

    def mean_logp(self, rows: Sequence[int], answers: Sequence[Sequence[Tokens]]) -> list[list[float]]:
        most = largest(self.accelerator, max(map(len, answers), default=0))
        if most == 0:
            return [[] for _ in rows]
        return answers_logp(self.model, self.collator, self._some(rows), answers or [[]], most)[: len(rows)]

    def _some(self, rows: Sequence[int]) -> list[Row]:
        return [self.rows[row] for row in rows] or [next(iter(self.rows.values()))]


@torch.no_grad()
def answers_logp(
    model: PreTrainedModel,
    collator: PairCollator,
    rows: Sequence[Row],
    answers: Sequence[Sequence[Tokens]],
    most: int,
) -> list[list[float]]:
    """The mean log-prob (nats per token) that `model`, with a head attached, gives each of the answers to each row.

    `most`: the largest number of answers to a row. One forward for the first answer of every row, one for the
    second, and so on.
    """
    logp: list[list[float]] = [[] for _ in rows]
    prompts = to_device(collator.prompts(rows), model.device)
    was_training = model.training
    model.eval()
    for place in range(most):
        # A row with fewer answers takes part with an end of sequence, so that the prompts serve as they are.
        column = [of_row[place] if place < len(of_row) else [collator.tokenizer.eos_token_id] for of_row in answers]
        inputs, labels = collator.join(prompts, column)
        mean = model(**inputs, head_op=lambda hidden, head, labels=labels: _mean_logp(hidden, head, labels))
        for of_row, found, value in zip(answers, logp, mean.tolist(), strict=True):
            if place < len(of_row):
                found.append(value)
    model.train(was_training)
    return logp


def _mean_logp(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    return linear_sequence_logprob(hidden, head, labels).mean
