"""The frozen reference of a stage: the model that the stage starts from.

Without LoRA it is a frozen copy of the policy. With LoRA it is the policy itself with a different adapter active: none
if the stage starts from a new adapter, which changes nothing yet, else a frozen copy of the adapter that the stage
starts from. That costs the memory of an adapter, not of a model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from cwdpo_kernels.integrations.hugging_face import evaluating
from cwdpo_trainer.models.adapters import POLICY, REFERENCE, adapter_weights, changes_nothing, switched_adapter
from cwdpo_trainer.models.loading import Model


def freeze_reference(policy: Model) -> Reference:
    """A frozen copy of `policy` as it is now, in evaluation mode: the reference of the stage that begins."""
    if not isinstance(policy, PeftModel):
        return copy.deepcopy(policy).eval().requires_grad_(False)
    if REFERENCE in policy.peft_config:
        policy.delete_adapter(REFERENCE)
    if changes_nothing(policy):
        return AdapterReference(policy, None)
    weights = adapter_weights(policy)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    policy.add_adapter(REFERENCE, policy.peft_config[POLICY])
    set_peft_model_state_dict(policy, {name: value.clone() for name, value in weights.items()}, REFERENCE)
    policy.set_adapter(POLICY)
    policy.requires_grad_(False)  # set_adapter unfreezes what model.freeze has frozen
    for parameter in trained:
        parameter.requires_grad_(True)
    return AdapterReference(policy, REFERENCE)


class AdapterReference(nn.Module):
    """`policy` with a different adapter active (None: with no adapter), without gradients and dropout.

    It shares the policy's weights without owning them: `parameters()` is empty. Calls and `generate` switch the adapter
    for their duration, under the autocast context `precision()`, which must be the policy's.
    """

    precision: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def __init__(self, policy: PeftModel, adapter: str | None) -> None:
        super().__init__()
        self._shared = (policy,)  # in a tuple, so that it does not become a submodule
        self.adapter = adapter
        self.eval()

    @property
    def policy(self) -> PeftModel:
        return self._shared[0]

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def move(self, device: torch.device) -> None:
        """Move the policy, which `to` would not reach. Quantized models are on their device already."""
        if self.device.type != device.type:
            self.policy.to(device)

    @property
    def generation_config(self) -> GenerationConfig:
        return self.policy.generation_config

    def forward(self, **inputs: Any) -> Any:
        with self._active() as model:
            return model(**inputs)

    def generate(self, **options: Any) -> Any:
        with self._active() as model:
            return model.generate(**options)

    @contextlib.contextmanager
    def _active(self) -> Iterator[PeftModel]:
        with evaluating(self.policy), torch.no_grad(), self.precision(), switched_adapter(self.policy, self.adapter):
            yield self.policy


Reference = PreTrainedModel | AdapterReference


def describe_reference(reference: Reference) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the log-probs of a reference depend on: its settings, and its weights by name without other adapters."""
    if not isinstance(reference, AdapterReference):
        return _settings(reference), reference.state_dict()
    policy, adapter = reference.policy, reference.adapter
    settings = _settings(policy.get_base_model())  # type: ignore[arg-type]  # peft's annotation says nn.Module
    if adapter is not None:
        settings["adapter"] = policy.peft_config[adapter].to_dict()
    others = policy.peft_config.keys() - {adapter}
    weights = {name: value for name, value in policy.state_dict().items() if others.isdisjoint(name.split("."))}
    return settings, weights


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    return {"model": type(model).__name__, "config": model.config.to_dict()}
