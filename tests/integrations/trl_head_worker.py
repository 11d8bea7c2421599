"""One of two gloo processes: gradients of log-probs and entropies under FSDP2, with our head and TRL's.

test_trl_head_sharded.py calls `python trl_head_worker.py OUT`, with RANK, WORLD_SIZE and the address in the
environment. Each process has one row of a batch of two; rank 0 writes the results.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer import utils

from cwdpo_kernels.integrations.trl_head import add_fused_lm_head

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
HEADS = {"ours": add_fused_lm_head, "TRL's": utils.add_fused_lm_head}


def gradients(install, shard=None, rows: slice = slice(None)) -> dict[str, Tensor]:
    """The gradients of all parameters, gathered; FSDP averages them over processes. `install` adds the fused head."""
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=False))
    ids = torch.randint(1, 97, (2, 9))
    install(model, outputs=("log_probs", "entropy"))
    if shard is not None:
        shard(model)
    output = model(input_ids=ids[rows], labels=ids[rows], fused_lm_head=True, num_items_in_batch=8)
    (output.loss - 0.1 * output.entropy.sum() / 8).backward()
    return {name: _whole(parameter.grad) for name, parameter in model.named_parameters()}


def _whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def own_unit(model: nn.Module) -> None:
    fully_shard(model.get_output_embeddings())
    fully_shard(model)


def root(model: nn.Module) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)


LAYOUTS = {"own unit": own_unit, "root": root}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for head, install in HEADS.items():
        for layout, shard in LAYOUTS.items():
            found[head, layout] = gradients(install, shard, slice(rank, rank + 1))
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
