"""What the frozen reference says about a batch, computed once for each pair of the data set; and whether it is the
model that the policy starts as."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from cwdpo_kernels import linear_sequence_logprob
from cwdpo_trainer.config.arguments import DPOArguments
from cwdpo_trainer.data.collator import Batch, PairCollator, Tokens, to_device
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.models.distributed import largest
from cwdpo_trainer.models.reference_cache import PairLogp, ReferenceCache, fingerprint, image_keys, pair_key
from cwdpo_trainer.negatives.pool import Mixed


class CachedReference:
    """Total log-probs under the reference: those of the data set's pairs from a cache, what it lacks by `forward`.

    `forward(batch)` gives the total log-prob [S] of each answer of a batch. A row's pair of the data set is
    computed as a whole, also at a step that pairs it with an on-policy negative; such negatives are computed in a
    forward of their own and not kept. So which answers share a forward, and with it the last bit of their
    log-probs, does not depend on how far a run had come when it was killed.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        forward: Callable[[Batch], Tensor],
        rows: dict[int, Row],
        collator: PairCollator,
        accelerator: Accelerator,
    ) -> None:
        self.cache = cache
        self._forward = forward
        self._rows = rows
        self._collator = collator
        self._accelerator = accelerator
        self._images: dict[int, list[str]] = {}

    def __call__(self, inputs: dict[str, Any], mixed: Mixed) -> tuple[Tensor, Tensor]:
        """Total log-probs [P] of the chosen answers and of the negatives in `mixed`, in nats."""
        chosen, rejected = self.of_pairs(inputs)
        drawn = [place for place, is_onpolicy in enumerate(mixed.is_onpolicy) if is_onpolicy]
        if largest(self._accelerator, len(drawn)):
            some = drawn or [0]  # all processes take part in the forward of a sharded model
            totals = self._compute(inputs, some, [mixed.negatives[place] for place in some])
            rejected[drawn] = totals[: len(drawn)]
        return chosen, rejected

    def of_pairs(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Total log-probs [P] of the data set's answers to a batch of the collator."""
        keys = self._keys(inputs)
        known = self.cache.get(keys)
        missing = [place for place, pair in enumerate(known) if pair is None]
        if largest(self._accelerator, len(missing)):
            some = missing or [0]
            answers = ([inputs[name][place] for place in some] for name in ("chosen", "rejected"))
            totals = self._compute(inputs, some, *answers).chunk(2)
            pairs = [PairLogp(*values) for values in zip(*(column.tolist() for column in totals), strict=True)]
            if missing:
                self.cache.add({keys[place]: pair for place, pair in zip(missing, pairs, strict=True)})
                known = self.cache.get(keys)
        device = self._accelerator.device
        return tuple(torch.tensor(column, device=device) for column in zip(*known, strict=True))

    def _compute(self, inputs: dict[str, Any], places: list[int], *answers: Sequence[Tokens]) -> Tensor:
        prompts = inputs["prompts"]
        if len(places) < len(inputs["rows"]):
            rows = [self._rows[inputs["rows"][place]] for place in places]
            prompts = to_device(self._collator.prompts(rows), self._accelerator.device)
        return self._forward(self._collator.join(prompts, *answers))

    def _keys(self, inputs: dict[str, Any]) -> list[str]:
        ids, mask = (inputs["prompts"][name].tolist() for name in ("input_ids", "attention_mask"))
        keys = []
        for place, row in enumerate(inputs["rows"]):
            if row not in self._images:
                self._images[row] = image_keys(self._rows[row])
            prompt = [token for token, is_there in zip(ids[place], mask[place], strict=True) if is_there]
            keys.append(pair_key(self._images[row], prompt, inputs["chosen"][place], inputs["rejected"][place]))
        return keys


def open_cache(args: DPOArguments, reference: nn.Module, collator: PairCollator) -> ReferenceCache | None:
    """The cache that `args` ask for, at the pairs of `reference`, no weight of which may be sharded yet."""
    if args.reference_cache is None:
        return None
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "weights"
    name = [fingerprint(reference, collator.processor, precision) if args.process_index == 0 else None]
    return ReferenceCache(Path(args.output_dir) / args.reference_cache / broadcast_object_list(name)[0])


@torch.no_grad()
def check_handover(model: nn.Module, batch: Batch, reference_totals: Tensor) -> None:
    """At the start the policy is its reference, of which a cache may speak: log-ratios are 0 within rounding.

    `reference_totals` [S] are in nats. Raises `RuntimeError` with the figures where they are not the model's.
    """
    was_training = model.training
    model.eval()
    logp, dtype = model(
        **batch.inputs,
        head_op=lambda hidden, head: (linear_sequence_logprob(hidden, head, batch.labels).total, hidden.dtype),
    )
    model.train(was_training)
    ratios = (logp - reference_totals).abs()
    worst = ratios.max().item()
    tolerance = 64 * torch.finfo(dtype).eps * max(1.0, logp.abs().max().item())
    if not (math.isfinite(worst) and worst <= tolerance):
        raise RuntimeError(
            f"handover: expected log-ratios of the first batch to have a size <= {tolerance:.1e} nats, "
            f"got {worst:.4g} (mean {ratios.mean().item():.4g}): "
            "the reference is not the model that stage 2 starts from"
        )
