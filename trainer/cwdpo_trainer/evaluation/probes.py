"""Metrics on held-out answers, measured while a stage trains. Early stopping, the doctor and the plots use them.

Answers are grouped into sets: `chosen` (right answers), one set per `negative_source` of the dataset (near, easy, ...),
and `onpolicy` (wrong answers sampled from the stage's reference). Log-probs are means over a set's answers. Per-token
metrics are means over all of a set's tokens.

    {set}_logp            nats per answer    {set}_delta_logp       minus the reference's, nats per answer
    {set}_mean_logp       nats per token     {set}_delta_mean_logp  minus the reference's, nats per token
    {set}_entropy         nats               {set}_tv, {set}_js     distance from the reference (js in nats)
    {set}_top1_prob       probability of the most likely token
    {set}_accuracy        share of tokens whose label is the most likely token
    {set}_ece             expected calibration error of the most likely token, 15 bins
    {set}_cooling         mean cooling weight w_c (negatives only)
    {set}_cooling_bin{i}  share of answers with w_c in [i/10, (i+1)/10), i = 0..9 (negatives only)

The reference is the model that the stage started from: the initial model in stage 1, the SFT model in stage 2.

All metrics of a batch come from one forward of each model. A token costs six products with a head: one for the policy's
statistics, one for the reference's log-prob, and four for TV and JS, which need both normalizers before they can sum
differences. The statistics do not return their normalizers, so two of the six are redundant. That is small beside the
forward over prompt and image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_calibration_error

from cwdpo_kernels import (
    IGNORE_INDEX,
    Cooling,
    Head,
    SequenceLogprob,
    cooling_weight,
    sequence_logprob,
    token_divergence,
    token_stats,
)
from cwdpo_kernels.integrations.hugging_face import evaluating
from cwdpo_kernels.integrations.shared_images import ImageFeatures
from cwdpo_trainer.config.arguments import ProbeArguments, SamplingArguments
from cwdpo_trainer.data.collator import Batch, PairCollator, SharedBatch, Tokens
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.negatives.sampling import GeneratingModel, batched, sample_answers

ECE_BINS = 15
COOLING_BINS = 10
METRICS = (
    "logp", "mean_logp", "delta_logp", "delta_mean_logp",
    "entropy", "top1_prob", "accuracy", "ece", "tv", "js",
)  # fmt: skip
Answer = tuple[Row, Tokens]


class _Measured(NamedTuple):
    """Values of a batch. Per answer [S]: `sum_logp`, `mean_logp` and the reference's. Per token [N]: the others."""

    sum_logp: Tensor
    mean_logp: Tensor
    ref_sum_logp: Tensor
    ref_mean_logp: Tensor
    entropy: Tensor
    top1_prob: Tensor
    is_top1: Tensor
    tv: Tensor
    js: Tensor


class Probes:
    """Held-out answers by set, and how a policy and its reference score them.

    `cooling` None means that it is not known yet, because stage 2 will measure it. Then there are no cooling metrics.
    Every process measures all rows: nothing has to be gathered, and any wrapped model works.
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
        self.image_features: ImageFeatures | None = None  # set if policy and reference may share them
        self.rows = list(rows[: settings.rows])
        self.sets = self._dataset_answers()

    def draw_onpolicy(self, reference: GeneratingModel, title: str | None = None) -> None:
        """Fill the set `onpolicy` with wrong answers sampled from `reference`. If all samples are right, there is no
        such set. With a `title`, shows a progress bar."""
        rows = [row for row, _ in self.sets["chosen"]]
        answers: list[Answer] = []
        for batch in batched(rows, self.batch_size, title):
            drawn = sample_answers(reference, self.collator, batch, self.sampling, self.seed)
            answers += [(row, tokens) for row, of_row in zip(batch, drawn, strict=True) for tokens in of_row]
        self.sets.pop("onpolicy", None)
        if answers:
            self.sets["onpolicy"] = answers

    def answer_counts(self) -> dict[str, int]:
        """The number of answers in each set: the n of its metrics."""
        return {name: len(answers) for name, answers in self.sets.items()}

    def names(self) -> list[str]:
        """The names of all metrics of all sets."""
        cooling = ("cooling", *(f"cooling_bin{index}" for index in range(COOLING_BINS)))
        return [
            f"{name}_{key}" for name in self.sets for key in (*METRICS, *(cooling if self._cooling_of(name) else ()))
        ]

    @torch.no_grad()
    def measure(
        self, policy: nn.Module, reference: nn.Module, device: torch.device, title: str | None = None
    ) -> dict[str, float]:
        """All metrics of all sets. `policy` may be wrapped (DDP, FSDP). With a `title`, shows progress bars."""
        found: dict[str, list[_Measured]] = {name: [] for name in self.sets}
        with evaluating(policy):
            for names, batch in self._batches(device, title):
                with contextlib.nullcontext() if self.image_features is None else self.image_features.once():
                    measured = _measure_batch(policy, reference, batch)
                for name in dict.fromkeys(names):
                    found[name].append(_of_set(measured, batch, torch.tensor([each == name for each in names])))
        metrics: dict[str, float] = {}
        for name, parts in found.items():
            of_set = _Measured(*(torch.cat(column) for column in zip(*parts, strict=True)))
            summary = _summarize(of_set)
            cooling = self._cooling_of(name)
            if cooling is not None:
                summary |= _summarize_cooling(cooling_weight(of_set.mean_logp, cooling))
            metrics |= {f"{name}_{key}": value for key, value in summary.items()}
        return metrics

    def _cooling_of(self, name: str) -> Cooling | None:
        return None if name == "chosen" else self.cooling

    def _dataset_answers(self) -> dict[str, list[Answer]]:
        sets: dict[str, dict[tuple[object, ...], Answer]] = {"chosen": {}}
        for row in self.rows:
            for name, answer in (("chosen", row.chosen), (row.negative_source, row.rejected)):
                # Rows with the same prompt and images but different negatives share one chosen answer.
                key = (*_prompt_key(row), repr(answer))
                (tokens,) = self.collator.answer_tokens(row, answer)
                sets.setdefault(name, {}).setdefault(key, (row, tokens))
        return {name: list(answers.values()) for name, answers in sets.items()}

    def _batches(self, device: torch.device, title: str | None) -> Iterator[tuple[list[str], Batch | SharedBatch]]:
        """Batches of answers, and each answer's set. With shared prompts, a batch has all answers to its prompts."""
        if self.collator.shares_prompts:
            yield from self._batches_of_prompts(device, title)
            return
        for name, answers in self.sets.items():
            for batch in batched(answers, self.batch_size, None if title is None else f"{title}: {name}"):
                prompts = self.collator.prompts([row for row, _ in batch])
                joined = self.collator.join(prompts, [tokens for _, tokens in batch])
                yield [name] * len(batch), joined.to(device)

    def _batches_of_prompts(
        self, device: torch.device, title: str | None
    ) -> Iterator[tuple[list[str], Batch | SharedBatch]]:
        by_prompt: dict[tuple[object, ...], list[tuple[str, Row, Tokens]]] = {}
        for name, answers in self.sets.items():
            for row, tokens in answers:
                by_prompt.setdefault(_prompt_key(row), []).append((name, row, tokens))
        for batch in batched(list(by_prompt.values()), self.batch_size, title):
            columns = list(zip_longest(*batch))  # groups of at most one answer to each prompt
            names = [each[0] for column in columns for each in column if each is not None]
            groups = [[None if each is None else each[2] for each in column] for column in columns]
            joined = self.collator.join(self.collator.prompts([of_prompt[0][1] for of_prompt in batch]), *groups)
            yield names, joined.to(device)


def _prompt_key(row: Row) -> tuple[object, ...]:
    return repr(row.prompt), row.images


def _measure_batch(policy: nn.Module, reference: nn.Module, batch: Batch | SharedBatch) -> _Measured:
    """Score the labeled tokens of a batch with both models.

    The reference's forward runs inside the policy's head call: TV and JS need both heads at the same time.
    """
    labeled = batch.labels != IGNORE_INDEX
    targets = batch.labels[labeled]

    def op(hidden: Tensor, head: Head) -> _Measured:
        rows = hidden[labeled]

        def reference_op(ref_hidden: Tensor, ref_head: Head) -> tuple[Tensor, ...]:
            ref_rows = ref_hidden[labeled]
            divergence = token_divergence(rows, head, ref_rows, ref_head)
            # The same op as for the policy, so that equal models have equal log-probs, to the last bit.
            return token_stats(ref_rows, ref_head, targets).logp, divergence.tv, divergence.js

        ref_logp, tv, js = batch.run(reference, reference_op)
        stats = token_stats(rows, head, targets)
        own, ref = (_per_answer(logp, batch) for logp in (stats.logp, ref_logp))
        return _Measured(
            own.total, own.mean, ref.total, ref.mean, stats.entropy, stats.top1_prob, stats.is_top1, tv, js
        )

    return batch.run(policy, op)


def _per_answer(logp: Tensor, batch: Batch | SharedBatch) -> SequenceLogprob:
    """From the labeled tokens' log-probs [N] to those of the answers [S]."""
    full = logp.new_zeros(batch.labels.shape)
    full[batch.labels != IGNORE_INDEX] = logp
    return sequence_logprob(full, batch.labels, batch.cu_seqlens)


def _of_set(measured: _Measured, batch: Batch | SharedBatch, chosen: Tensor) -> _Measured:
    """The values of the answers that `chosen` [S] marks, and of their tokens."""
    answers = chosen.to(batch.labels.device)
    bounds = batch.cu_seqlens
    tokens = answers.repeat_interleave((batch.labels != IGNORE_INDEX).sum(1) if bounds is None else bounds.diff())
    return _Measured(*(value[answers if len(value) == len(answers) else tokens] for value in measured))


def _summarize(measured: _Measured) -> dict[str, float]:
    mean = {name: value.double().mean().item() for name, value in measured._asdict().items()}
    # Rounding can make a probability exceed 1. torchmetrics would then take all values for logits.
    confidence = measured.top1_prob.clamp(0, 1)
    ece = binary_calibration_error(confidence, measured.is_top1.int(), n_bins=ECE_BINS, norm="l1")
    return {
        "logp": mean["sum_logp"],
        "mean_logp": mean["mean_logp"],
        "delta_logp": mean["sum_logp"] - mean["ref_sum_logp"],
        "delta_mean_logp": mean["mean_logp"] - mean["ref_mean_logp"],
        "entropy": mean["entropy"],
        "top1_prob": mean["top1_prob"],
        "accuracy": mean["is_top1"],
        "ece": ece.item(),
        "tv": mean["tv"],
        "js": mean["js"],
    }


def _summarize_cooling(weights: Tensor) -> dict[str, float]:
    weights = weights.float().cpu()  # histc is not deterministic on CUDA
    shares = torch.histc(weights, bins=COOLING_BINS, min=0.0, max=1.0) / weights.numel()
    bins = {f"cooling_bin{index}": share for index, share in enumerate(shares.tolist())}
    return {"cooling": weights.double().mean().item(), **bins}
