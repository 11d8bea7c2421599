"""`CoolingDPOTrainer(prefix_sharing=...)`: turns TRL's padded batches into token trees."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .. import IGNORE_INDEX, Head, shift_labels
from .hugging_face import evaluating
from .shared_images import ImageFeatures
from .shared_pairs import PairsDiffer, tree_of_pairs
from .shared_prefix import TreeBatch, TreesUnsupported, compare_forwards, enable_trees

OP = "CoolingDPOTrainer"


class PaddedRows(NamedTuple):
    """The answers of 2P padded rows, each with its own copy of the prompt. It has the interface of `TreeBatch`."""

    inputs: dict[str, Any]
    labels: Tensor  # [2P, T]

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> PaddedRows:
        """The rows of a batch from TRL's collator. The model gets all keys but TRL's own, as processors may add any."""
        own = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
        labels = shift_labels(inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX))
        return cls({name: value for name, value in inputs.items() if name not in own}, labels)

    @property
    def cu_seqlens(self) -> None:
        """Labels are padded, not packed."""
        return None

    def run(self, model: nn.Module, op: Callable[[Tensor, Head], Any]) -> Any:
        """The result of `op(hidden, head)` inside the forward of `model`; `hidden` is aligned with `labels`."""
        tokens = self.labels.shape[1]  # prompt tuning adds hidden states of virtual tokens at the start
        return model(**self.inputs, head_op=lambda hidden, head: op(hidden[:, hidden.shape[1] - tokens :], head))


class Batch(NamedTuple):
    """`rows`: as collated. `answers`: what the forwards run on, which is `rows` or token trees made from them."""

    rows: PaddedRows
    answers: PaddedRows | TreeBatch


class PromptSharing:
    """Shares prompts in a trainer, if `is_on`. `given`: the arguments of `DPOTrainer`, by name.

    Raises `NotImplementedError` for options that do not work with shared prompts.
    """

    def __init__(self, is_on: bool, given: dict[str, Any]) -> None:
        self.is_on = is_on
        self._compared: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._has_warned = False
        self._features: ImageFeatures | None = None
        if not is_on:
            return
        if getattr(given.get("args"), "torch_compile", False):
            _refuse("torch_compile is on")
        configs = [given.get("peft_config"), *getattr(given["model"], "peft_config", {}).values()]
        if any(getattr(config, "is_prompt_learning", False) for config in configs):
            _refuse("prompt learning of peft puts virtual tokens before each row")

    def enable(self, model: nn.Module) -> None:
        """Let policy or reference run on trees. Raises `NotImplementedError` if it cannot."""
        if self.is_on:
            try:
                enable_trees(model)
            except TreesUnsupported as reason:
                _refuse(str(reason))

    def images_once(self, *models: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Within this context, `models` (policy and reference) share the image features of a frozen vision path."""
        if not self.is_on:
            return contextlib.nullcontext()
        if self._features is None:
            self._features = ImageFeatures(*models)
        return self._features.once()

    def batch(self, model: nn.Module, inputs: dict[str, Any]) -> Batch:
        """The batch that TRL's collator made. If its pairs cannot share images, it runs on separate rows, and the first
        such batch causes a warning."""
        rows = PaddedRows.of(inputs)
        if not self.is_on:
            return Batch(rows, rows)
        try:
            return Batch(rows, tree_of_pairs(model, rows.inputs, inputs["completion_mask"]))
        except PairsDiffer as reason:
            if not self._has_warned:
                self._has_warned = True
                text = f"{OP}: a batch runs without prefix_sharing: {reason} (warns only once)"
                warnings.warn(text, stacklevel=2)
            return Batch(rows, rows)

    def check(self, model: nn.Module, batch: Batch, accelerator: Accelerator) -> None:
        """Compare each model's log-probs with those of separate rows, on the first batch that shares a prompt.

        All processes run the same forwards, because forwards of sharded models are collective. Raises `ValueError` if
        the log-probs differ by more than rounding, and `NotImplementedError` if the model fails on token trees.
        """
        if not self.is_on or model in self._compared:
            return
        try:
            with evaluating(model):
                difference, tolerance = compare_forwards(model, batch.rows, batch.answers)
        except TreesUnsupported as reason:
            _refuse(str(reason))
        labels = batch.rows.labels
        is_compared = batch.answers is not batch.rows and bool((labels != IGNORE_INDEX).any())
        found = torch.tensor([[difference, tolerance, is_compared]], device=labels.device)
        for difference, tolerance, is_compared in accelerator.gather(found).tolist():
            if not difference <= tolerance:
                name = type(accelerator.unwrap_model(model)).__name__
                raise ValueError(
                    f"{OP}: expected prefix_sharing=True to have log-probs within {tolerance:.1e} nats of those of "
                    f"separate rows, got {difference:.2g}: {name} cannot share prompts. Use prefix_sharing=False"
                )
            if is_compared:
                self._compared.add(model)


def _refuse(reason: str) -> NoReturn:
    raise NotImplementedError(f"{OP}: prefix_sharing=True is not supported here: {reason}. Use prefix_sharing=False")
