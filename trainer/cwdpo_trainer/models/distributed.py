"""Several processes: what is supported, and how the frozen reference is laid out over them.

DDP and FSDP2 go through accelerate, from its configuration (`accelerate launch --config_file`; see configs/). The
policy's head is called inside the wrapped model, so that their hooks fire (`attach_head`).
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
from cwdpo_trainer.models.loading import AdapterReference

WHERE = "accelerate's configuration"


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def largest(accelerator: Accelerator, number: int) -> int:
    """`number`; the largest one of all processes where a model is sharded, as its forward takes all of them."""
    if not is_sharded(accelerator):
        return number
    return int(accelerator.reduce(torch.tensor(number, device=accelerator.device), "max").item())


def check_distribution(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise `InputError` for a layout that would train wrongly or could not save; choose the units of FSDP2 where the
    configuration does not."""
    kind = accelerator.distributed_type
    require(kind != DistributedType.DEEPSPEED, WHERE, "distributed_type", "NO, MULTI_* or FSDP", kind.value)
    if not is_sharded(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    require(plugin.fsdp_version == 2, WHERE, "fsdp_version", 2, plugin.fsdp_version)
    state_dict = str(plugin.state_dict_type)
    require("FULL" in state_dict, WHERE, "fsdp_state_dict_type", "FULL_STATE_DICT", state_dict)
    # The head is measured before it is sharded, in every process, and needs its weights there.
    lean = plugin.cpu_ram_efficient_loading
    require(not lean, WHERE, "fsdp_cpu_ram_efficient_loading", "false", lean)
    if plugin.transformer_cls_names_to_wrap is None:
        # accelerate would take all that the class names, and fail at those that this model does not have.
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present & set(model._no_split_modules or ()))


def prepare_reference(accelerator: Accelerator, reference: nn.Module) -> nn.Module:
    """The reference as the policy will be: whole or sharded, in its precision. An adapter's is the policy itself."""
    if isinstance(reference, AdapterReference):
        # Asked before the library prepares the policy, too.
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
    """For the time of loading an optimizer: parameters that never got a gradient count as frozen.

    Some towers have a layer that the language model never sees. It has no state in a checkpoint, and torch refuses to
    load the checkpoint of a sharded model in which a trained parameter has none.
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
