"""Stage 1: constrained supervised fine-tuning."""

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
from cwdpo_trainer.config.arguments import SFTArguments
from cwdpo_trainer.stages.base import StageTrainer


class ConstrainedSFTTrainer(StageTrainer):
    """Stage 1: NLL of the chosen answers, and gentle negatives."""

    args: SFTArguments

    def _loss(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        batch = self._pairs(inputs)

        def op(hidden: Tensor, head: Head) -> ConstrainedSFTOutput:
            negatives = self.args.gentle_negatives
            if negatives.mode == "hinge" and self.accelerator.num_processes > 1:
                return self._hinge_over_processes(linear_sequence_logprob(hidden, head, batch.labels), negatives)
            return linear_constrained_sft_loss(hidden, head, batch.labels, negatives=negatives)

        return model(**batch.inputs, head_op=op)

    def _hinge_over_processes(self, logp: SequenceLogprob, negatives: GentleNegatives) -> ConstrainedSFTOutput:
        """The hinge is on the mean over the batch of all processes, so each moves its floor by how far its own mean
        lies from that."""
        chosen, rejected = (SequenceLogprob(*parts) for parts in zip(*(x.chunk(2) for x in logp), strict=True))
        nll = -(rejected.mean if negatives.normalize == "token" else rejected.total).detach().mean()
        away = self.accelerator.reduce(nll, "mean") - nll
        moved = dataclasses.replace(negatives, nll_floor=negatives.nll_floor - away.item())
        return constrained_sft_loss(chosen, rejected, negatives=moved)

    def _figures(self, output: Any) -> dict[str, Tensor]:
        return {name: getattr(output, name) for name in ("chosen_nll", "rejected_nll", "penalty")}
