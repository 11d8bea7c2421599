"""`head_op` under DDP and FSDP2: two processes, each with half of the pairs, get the gradient of one with all of them.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

PAIRS, WORLD = 4, 2


def gradients(model, tokens, labels, reference):
    """Of the CW-DPO loss of pairs [2, P, T], by name, whole."""
    from cwdpo_kernels import Cooling, linear_cwdpo_loss

    def op(hidden, head):
        cooling = Cooling(logp_floor=-4.0, temperature=1.0)
        return linear_cwdpo_loss(hidden, head, labels.flatten(0, 1), *reference, beta=0.3, cooling=cooling)

    model(input_ids=tokens.flatten(0, 1), head_op=op).loss.backward()
    grads = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def sharded(model):
    """As accelerate shards an untied model: every layer and the head are units of their own."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
    for unit in (*model.model.layers, model.lm_head, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    return model


def one_process(rank: int, folder: Path) -> None:
    """Write the relative error of every gradient, under each wrapper."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cwdpo_kernels.adapters.hugging_face import attach_head

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    attach_head(model)
    batch = torch.randint(61, (2, PAIRS, 8)), torch.randint(61, (2, PAIRS, 8)), torch.randn(2, PAIRS) - 30
    truth = gradients(copy.deepcopy(model), *batch)
    errors = {}
    for name, wrap in {"ddp": DistributedDataParallel, "fsdp": sharded}.items():
        found = gradients(wrap(copy.deepcopy(model)), *(part[:, rank::WORLD] for part in batch))
        errors[name] = {key: ((found[key] - grad).norm() / grad.norm()).item() for key, grad in truth.items()}
    (folder / f"errors{rank}.json").write_text(json.dumps(errors))
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="no gloo")
def test_gradients_under_ddp_and_fsdp(tmp_path):
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in range(WORLD)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=300) for process in processes] == [0] * WORLD
    for rank in range(WORLD):
        errors = json.loads((tmp_path / f"errors{rank}.json").read_text())
        assert errors.keys() == {"ddp", "fsdp"}
        for wrapper, by_name in errors.items():
            assert "lm_head.weight" in by_name
            assert max(by_name.values()) < 1e-5, wrapper


if __name__ == "__main__":
    one_process(int(sys.argv[1]), Path(sys.argv[2]))
