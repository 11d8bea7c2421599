"""Figures on held-out answers, taken while a stage trains: the signals that early stopping and pictures use.

The sets are `chosen` (right answers), one per `negative_source` of the data set (near, easy, ...), and
`onpolicy` (wrong answers that the stage's reference drew). For each set, per-token figures are means over the
set's tokens and log-probs are means over its answers:

    {set}_logp            nats per answer    {set}_delta_logp       less that under the reference, nats
    {set}_mean_logp       nats per token     {set}_delta_mean_logp  the same per token
    {set}_entropy         nats               {set}_tv, {set}_js     against the reference; js in nats
    {set}_top1_prob, {set}_accuracy (label is the most likely token), {set}_ece
    {set}_cooling, {set}_cooling_bin{0..9}: mean of w_c and its histogram (shares), negatives only

The reference is the model that the stage started from: the initial one in stage 1, the SFT model in stage 2.

All figures of a batch come from one forward of each model and one call of each head. A token costs six products
with a head: one for the policy's statistics, one for the reference's log-prob, and four for TV and JS, which need
both normalisers before they can add up differences. No op returns normalisers with its statistics, so these are not
shared; beside the backbones' passes over prompt and image the two products too many do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_calibration_error
from transformers import PreTrainedModel

from cwdpo_kernels import (
    Cooling,
    Head,
    cooling_weight,
    linear_logprob,
    sequence_logprob,
    token_divergence,
    token_stats,
)
from cwdpo_trainer.config.arguments import ProbeArguments, SamplingArguments
from cwdpo_trainer.data.collator import Batch, PairCollator, Tokens, to_device
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.negatives.sampling import batched, sample_answers

ECE_BINS = 15
COOLING_BINS = 10
FIGURES = (
    "logp", "mean_logp", "delta_logp", "delta_mean_logp",
    "entropy", "top1_prob", "accuracy", "ece", "tv", "js",
)  # fmt: skip
Answer = tuple[Row, Tokens]


class _Measured(NamedTuple):
    """Of one batch: per answer [S] `total`, `mean`, `ref_total`, `ref_mean`; per token [N] the others."""

    total: Tensor
    mean: Tensor
    ref_total: Tensor
    ref_mean: Tensor
    entropy: Tensor
    top1_prob: Tensor
    is_top1: Tensor
    tv: Tensor
    js: Tensor


class Probes:
    """Held-out answers by set, and what a policy and its reference make of them.

    Every process measures all rows, so that nothing need be gathered and any kind of wrapped model works.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        collator: PairCollator,
        settings: ProbeArguments,
        sampling: SamplingArguments,
        cooling: Cooling | None,
        seed: int,
    ) -> None:
        self.collator = collator
        self.batch_size = settings.batch_size
        self.cooling = cooling
        self.sampling = sampling
        self.seed = seed
        self.rows = list(rows[: settings.rows])
        self.sets = self._answers_of_data()

    def draw_onpolicy(self, reference: PreTrainedModel, title: str | None = None) -> None:
        """Make the set `onpolicy` of wrong answers that `reference` draws; if none is, there is no set. With a
        `title` under a progress bar."""
        scenes = [row for row, _ in self.sets["chosen"]]
        answers: list[Answer] = []
        for batch in batched(scenes, self.batch_size, title):
            drawn = sample_answers(reference, self.collator, batch, self.sampling, self.seed)
            answers += [(row, tokens) for row, of_row in zip(batch, drawn, strict=True) for tokens in of_row]
        self.sets.pop("onpolicy", None)
        if answers:
            self.sets["onpolicy"] = answers

    def names(self) -> list[str]:
        """The names of the figures of all sets."""
        cooling = ("cooling", *(f"cooling_bin{place}" for place in range(COOLING_BINS)))
        return [f"{name}_{key}" for name in self.sets for key in (*FIGURES, *(cooling if self._cools(name) else ()))]

    @torch.no_grad()
    def measure(
        self, policy: nn.Module, reference: nn.Module, device: torch.device, title: str | None = None
    ) -> dict[str, float]:
        """All figures of all sets; `policy` may be wrapped, and is left in the mode that it was in. With a `title`
        under progress bars."""
        was_training = policy.training
        policy.eval()
        figures: dict[str, float] = {}
        for name, answers in self.sets.items():
            batches = self._batches(answers, device, None if title is None else f"{title}: {name}")
            parts = [_measure_batch(policy, reference, batch) for batch in batches]
            measured = _Measured(*(torch.cat(column) for column in zip(*parts, strict=True)))
            figures |= {f"{name}_{key}": value for key, value in _summary(measured).items()}
            if self._cools(name):
                summary = _cooling_summary(cooling_weight(measured.mean, self.cooling))
                figures |= {f"{name}_{key}": value for key, value in summary.items()}
        policy.train(was_training)
        return figures

    def _cools(self, name: str) -> bool:
        """Whether a set has a cooling weight: `cooling` is None while it has not been measured yet (stage 1)."""
        return name != "chosen" and self.cooling is not None

    def _answers_of_data(self) -> dict[str, list[Answer]]:
        sets: dict[str, dict[tuple[object, ...], Answer]] = {"chosen": {}}
        for row in self.rows:
            for name, answer in (("chosen", row.chosen), (row.negative_source, row.rejected)):
                # A scene may come with several negatives, its right answer counts once.
                key = (repr(row.prompt), row.images, repr(answer))
                sets.setdefault(name, {}).setdefault(key, (row, self.collator.answer_tokens(row, answer)))
        return {name: list(answers.values()) for name, answers in sets.items()}

    def _batches(self, answers: Sequence[Answer], device: torch.device, title: str | None) -> Iterator[Batch]:
        for batch in batched(answers, self.batch_size, title):
            prompts = self.collator.prompts([row for row, _ in batch])
            inputs, labels = self.collator.join(prompts, [tokens for _, tokens in batch])
            yield Batch(to_device(inputs, device), labels.to(device))


def _measure_batch(policy: nn.Module, reference: nn.Module, batch: Batch) -> _Measured:
    """Both models on the labelled tokens of a batch; the reference runs inside the policy's head call, where
    both heads are at hand."""
    inputs, labels = batch
    labelled = labels >= 0
    targets = labels[labelled]

    def op(hidden: Tensor, head: Head) -> _Measured:
        rows = hidden[labelled]

        def reference_op(ref_hidden: Tensor, ref_head: Head) -> tuple[Tensor, ...]:
            ref_rows = ref_hidden[labelled]
            divergence = token_divergence(rows, head, ref_rows, ref_head)
            return linear_logprob(ref_rows, ref_head, targets), divergence.tv, divergence.js

        ref_logp, tv, js = reference(**inputs, head_op=reference_op)
        stats = token_stats(rows, head, targets)
        own, ref = (_per_answer(logp, labels) for logp in (stats.logp, ref_logp))
        return _Measured(
            own.total, own.mean, ref.total, ref.mean, stats.entropy, stats.top1_prob, stats.is_top1, tv, js
        )

    return policy(**inputs, head_op=op)


def _per_answer(logp: Tensor, labels: Tensor):
    padded = logp.new_zeros(labels.shape)
    padded[labels >= 0] = logp
    return sequence_logprob(padded, labels)


def _summary(measured: _Measured) -> dict[str, float]:
    mean = {name: value.double().mean().item() for name, value in measured._asdict().items()}
    # Rounding may lift a probability above 1, which torchmetrics would take for a logit.
    confidence = measured.top1_prob.clamp(0, 1)
    ece = binary_calibration_error(confidence, measured.is_top1.int(), n_bins=ECE_BINS, norm="l1")
    values = (
        mean["total"],
        mean["mean"],
        mean["total"] - mean["ref_total"],
        mean["mean"] - mean["ref_mean"],
        mean["entropy"],
        mean["top1_prob"],
        mean["is_top1"],
        ece.item(),
        mean["tv"],
        mean["js"],
    )
    return dict(zip(FIGURES, values, strict=True))


def _cooling_summary(weights: Tensor) -> dict[str, float]:
    weights = weights.float().cpu()  # histc has no integer-exact CUDA form that is deterministic
    shares = torch.histc(weights, bins=COOLING_BINS, min=0.0, max=1.0) / weights.numel()
    bins = {f"cooling_bin{place}": share for place, share in enumerate(shares.tolist())}
    return {"cooling": weights.double().mean().item(), **bins}
