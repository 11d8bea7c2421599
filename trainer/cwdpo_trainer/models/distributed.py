"""Training in several processes: the supported layouts, and how the frozen reference is distributed.

accelerate sets up DDP and FSDP2 from its own config file (`accelerate launch --config_file`; see launch/). The policy's
head is called inside the wrapped model, so their hooks run (`attach_head`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import OPTIMIZER_NAME, DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from cwdpo_trainer.errors import require
from cwdpo_trainer.models.reference import AdapterReference

WHERE = "accelerate config"


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def largest(accelerator: Accelerator, number: int) -> int:
    """`number`; its maximum over all processes if the model is sharded, because then all take part in each forward."""
    if not is_sharded(accelerator):
        return number
    return int(accelerator.reduce(torch.tensor(number, device=accelerator.device), "max").item())


def check_distribution(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise `InputError` for a layout that would train wrongly or could not be saved.

    Also chooses the modules that FSDP2 wraps, unless accelerate's config does.
    """
    kind = accelerator.distributed_type
    require(kind != DistributedType.DEEPSPEED, WHERE, "distributed_type", "NO, MULTI_* or FSDP", kind.value)
    if not is_sharded(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    require(plugin.fsdp_version == 2, WHERE, "fsdp_version", 2, plugin.fsdp_version)
    state_dict = str(plugin.state_dict_type)
    require("FULL" in state_dict, WHERE, "fsdp_state_dict_type", "FULL_STATE_DICT", state_dict)
    # Every process measures the head before it is sharded, and needs its weights.
    lean = plugin.cpu_ram_efficient_loading
    require(not lean, WHERE, "fsdp_cpu_ram_efficient_loading", "false", lean)
    if plugin.transformer_cls_names_to_wrap is None:
        # accelerate would take every module that the class names, and fail for those that this model lacks.
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present & set(getattr(model, "_no_split_modules", None) or ()))


def prepare_reference(accelerator: Accelerator, reference: nn.Module) -> nn.Module:
    """Put the reference on its device, sharded if the policy is, and in the policy's precision."""
    if isinstance(reference, AdapterReference):
        # It may be called before the library has moved the policy to its device.
        reference.precision = accelerator.autocast
        reference.move(accelerator.device)
        return reference
    if not is_sharded(accelerator):
        return accelerator.prepare_model(reference, evaluation_mode=True)
    reference = fsdp2_prepare_model(accelerator, reference)
    register_fsdp_forward_method(reference, "generate")
    return reference


@contextlib.contextmanager
def saved_parameters_only(accelerator: Accelerator, model: nn.Module, checkpoint: str | None) -> Iterator[None]:
    """Inside, parameters without optimizer state in `checkpoint` are frozen, so that the optimizer can be loaded.

    Some vision towers have a layer whose output the language model never uses. It gets no gradient, so it has no state,
    and torch refuses to load the optimizer of a sharded model if a trainable parameter has none.
    """
    unused: list[nn.Parameter] = []
    if is_sharded(accelerator) and checkpoint is not None:
        saved = torch.load(Path(checkpoint) / f"{OPTIMIZER_NAME}.bin", mmap=True, weights_only=True)["state"]
        unused = [value for name, value in model.named_parameters() if value.requires_grad and name not in saved]
    for parameter in unused:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in unused:
            parameter.requires_grad_(True)
