"""Log-probs under the frozen reference, cached for the dataset's pairs; and the check that it is the initial policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from cwdpo_kernels import linear_sequence_logprob
from cwdpo_kernels.integrations.hugging_face import evaluating
from cwdpo_trainer.config.stage_arguments import DPOArguments
from cwdpo_trainer.data.collator import Batch, PairCollator, SharedBatch, Tokens, to_device
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.models.distributed import largest
from cwdpo_trainer.models.reference import Reference
from cwdpo_trainer.models.reference_cache import PairLogp, ReferenceCache, fingerprint, image_keys, pair_key
from cwdpo_trainer.negatives.pool import BatchNegatives

DUMMY = [0]  # a batch index. Forwards of a sharded model are collective, so a process without work runs this one.


class CachedReference:
    """Summed log-probs under the reference: the dataset's pairs from a cache, everything else from `forward`.

    `forward(batch)` returns the summed log-prob [S] of each answer of a batch. A dataset pair is always computed and
    cached as a whole, even at a step that replaces its negative. On-policy negatives take a forward of their own and
    are not cached. So which answers share a forward, and with it the last bit of a log-prob, does not depend on when
    a run was killed.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        forward: Callable[[Batch | SharedBatch], Tensor],
        rows: dict[int, Row],
        collator: PairCollator,
        accelerator: Accelerator,
    ) -> None:
        self.cache = cache
        self._forward = forward
        self._rows = rows
        self._collator = collator
        self._accelerator = accelerator
        self._image_keys: dict[int, list[str]] = {}  # by row

    def __call__(self, inputs: dict[str, Any], negatives: BatchNegatives) -> tuple[Tensor, Tensor]:
        """Summed log-probs [P] of the chosen answers and of `negatives`, in nats."""
        chosen, rejected = self.of_dataset_pairs(inputs)
        drawn = [index for index, is_onpolicy in enumerate(negatives.is_onpolicy) if is_onpolicy]
        if largest(self._accelerator, len(drawn)):
            indices = drawn or DUMMY
            logp = self._compute(inputs, indices, [negatives.answers[index] for index in indices])
            rejected[drawn] = logp[: len(drawn)]
        return chosen, rejected

    def of_dataset_pairs(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Summed log-probs [P] of the dataset's chosen and rejected answers to a batch of `PairCollator`, in nats."""
        keys = self._keys(inputs)
        cached = self.cache.get(keys)
        missing = [index for index, pair in enumerate(cached) if pair is None]
        if largest(self._accelerator, len(missing)):
            indices = missing or DUMMY
            answers = ([inputs[name][index] for index in indices] for name in ("chosen", "rejected"))
            columns = self._compute(inputs, indices, *answers).chunk(2)
            pairs = [PairLogp(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]
            if missing:
                self.cache.add({keys[index]: pair for index, pair in zip(missing, pairs, strict=True)})
                cached = self.cache.get(keys)
        device = self._accelerator.device
        chosen, rejected = (torch.tensor(column, device=device) for column in zip(*cached, strict=True))
        return chosen, rejected

    def _compute(self, inputs: dict[str, Any], indices: list[int], *answers: Sequence[Tokens]) -> Tensor:
        """`forward` on the batch's prompts at `indices`, with a list of one answer per index for each of `answers`."""
        prompts = inputs["prompts"]
        if len(indices) < len(inputs["rows"]):
            rows = [self._rows[inputs["rows"][index]] for index in indices]
            prompts = to_device(self._collator.prompts(rows), self._accelerator.device)
        return self._forward(self._collator.join(prompts, *answers))

    def _keys(self, inputs: dict[str, Any]) -> list[str]:
        ids, mask = (inputs["prompts"][name].tolist() for name in ("input_ids", "attention_mask"))
        keys = []
        for index, row in enumerate(inputs["rows"]):
            if row not in self._image_keys:
                self._image_keys[row] = image_keys(self._rows[row])
            prompt = [token for token, is_token in zip(ids[index], mask[index], strict=True) if is_token]
            keys.append(pair_key(self._image_keys[row], prompt, inputs["chosen"][index], inputs["rejected"][index]))
        return keys


def open_cache(args: DPOArguments, reference: Reference, collator: PairCollator) -> ReferenceCache | None:
    """The cache folder that belongs to `reference`, or None if `args` turn caching off or the loss has no reference.

    The folder's name is a hash of all weights, so call this before they are sharded.
    """
    if args.reference_cache is None or not args.needs_reference:
        return None
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "weights"
    names = [fingerprint(reference, collator.processor, precision) if args.process_index == 0 else None]
    (name,) = broadcast_object_list(names)
    return ReferenceCache(args.folder / args.reference_cache / name)


@torch.no_grad()
def check_handover(model: nn.Module, batch: Batch | SharedBatch, reference_sums: Tensor) -> None:
    """Check that stage 2 starts from its reference: all log-ratios of the batch are 0 within rounding.

    `reference_sums` [S]: the answers' summed log-probs under the reference, in nats; they may come from a cache.
    Raises `RuntimeError` with the largest log-ratio if it is more than rounding explains.
    """
    with evaluating(model):
        logp, dtype = batch.run(
            model,
            lambda hidden, head: (
                linear_sequence_logprob(hidden, head, batch.labels, batch.cu_seqlens).total, hidden.dtype
            ),
        )  # fmt: skip
    ratios = (logp - reference_sums).abs()
    worst = ratios.max().item()
    tolerance = 64 * torch.finfo(dtype).eps * max(1.0, logp.abs().max().item())
    if not (math.isfinite(worst) and worst <= tolerance):
        raise RuntimeError(
            f"handover: expected log-ratios of the first batch to have a size <= {tolerance:.1e} nats, "
            f"got {worst:.4g} (mean {ratios.mean().item():.4g}): "
            "the reference is not the model that stage 2 starts from"
        )
