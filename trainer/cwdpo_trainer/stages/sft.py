"""Stage 1: constrained supervised fine-tuning.

    loss = NLL(chosen) + weight * ReLU(nll_floor - mean over the batch of NLL(rejected))

or the other forms of `cwdpo_kernels.GentleNegatives`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from cwdpo_kernels import (
    ConstrainedSFTOutput,
    GentleNegatives,
    Head,
    SequenceLogprob,
    constrained_sft_loss,
    linear_constrained_sft_loss,
    linear_sequence_logprob,
)
from cwdpo_trainer.config.stage_arguments import SFTArguments
from cwdpo_trainer.stages.base import StageTrainer


class ConstrainedSFTTrainer(StageTrainer):
    """Stage 1: minimize the NLL of the chosen answers, and keep that of the rejected ones above a floor."""

    args: SFTArguments

    def _loss_output(self, model: nn.Module, inputs: dict[str, Any]) -> ConstrainedSFTOutput:
        batch = self._dataset_batch(inputs)

        def op(hidden: Tensor, head: Head) -> ConstrainedSFTOutput:
            negatives = self.args.gentle_negatives
            if negatives.mode != "smoothed" and self.accelerator.num_processes > 1:
                logp = linear_sequence_logprob(hidden, head, batch.labels, batch.cu_seqlens)
                return self._floor_over_processes(logp, negatives)
            return linear_constrained_sft_loss(
                hidden, head, batch.labels, negatives=negatives, cu_seqlens=batch.cu_seqlens
            )

        return batch.run(model, op)

    def _floor_over_processes(self, logp: SequenceLogprob, negatives: GentleNegatives) -> ConstrainedSFTOutput:
        """The loss whose floor is for the mean NLL of all processes' batches.

        floor - mean = (floor - (mean - own)) - own, so each process shifts its floor by the difference between the mean
        and its own NLL.
        """
        chosen, rejected = (SequenceLogprob(*parts) for parts in zip(*(x.chunk(2) for x in logp), strict=True))
        own = -(rejected.mean if negatives.normalize == "token" else rejected.total).detach().mean()
        shift = self.accelerator.reduce(own, "mean") - own
        shifted = dataclasses.replace(negatives, nll_floor=negatives.nll_floor - shift.item())
        return constrained_sft_loss(chosen, rejected, negatives=shifted)

    def _metrics(self, output: ConstrainedSFTOutput) -> dict[str, Tensor]:
        return {name: getattr(output, name) for name in ("chosen_nll", "rejected_nll", "penalty")}
