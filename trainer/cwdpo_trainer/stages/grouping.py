"""Batches of pairs of similar length (`train_sampling_strategy: group_by_length`), so that less of them is padding."""

from __future__ import annotations

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.lengths import LengthMeter
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.reporter import progress


class GroupedByLength(LengthGroupedSampler):
    """The library's sampler, with the tokens of the prompt and the longer answer as a row's length.

    The order depends on the seed and the epoch alone, so that a resumed run continues with the same batches.
    """

    def __init__(self, rows: list[Row], collator: PairCollator, batch_size: int, seed: int) -> None:
        meter = LengthMeter(collator)
        lengths = [meter(row).total for row in progress(rows, "lengths of rows", delay=2, leave=False)]
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator().manual_seed(seed))
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)
