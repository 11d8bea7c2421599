"""One of two gloo processes. Trains a tiny model in every layout; rank 0 writes the results.

test_sharded_head.py calls `python layout_worker.py OUT`, with RANK, WORLD_SIZE and the address in the environment. Each
process has one pair of a batch of two.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cwdpo_kernels import Cooling, linear_cwdpo_loss
from cwdpo_kernels.integrations.hugging_face import attach_head

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import TEXT_TOKENS, llava, qwen2_5_vl

STEPS = 20
COOLING = Cooling(logp_floor=-3.0, temperature=1.0)


def untied() -> tuple[nn.Module, dict[str, Tensor]]:
    return llava()


def tied() -> tuple[nn.Module, dict[str, Tensor]]:
    return qwen2_5_vl(tied=True)


MODELS = {"untied": untied, "tied": tied}


def _head_in_its_own_unit(model: nn.Module) -> None:
    fully_shard(model.get_output_embeddings())
    fully_shard(model)


def _head_in_the_root(model: nn.Module) -> None:
    for layer in model.model.language_model.layers:
        fully_shard(layer)
    fully_shard(model)


def _head_with_the_norm(model: nn.Module) -> None:
    """The layout of accelerate: tied embeddings share the unit of the head."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shared = [embedding] if head.weight is embedding.weight else []
    fully_shard([model.model.language_model.norm, *shared, head], reshard_after_forward=False)
    fully_shard(model)


LAYOUTS = {
    ("untied", "own unit"): _head_in_its_own_unit,
    ("untied", "root"): _head_in_the_root,
    ("untied", "with the norm"): _head_with_the_norm,
    ("tied", "root"): _head_in_the_root,
    ("tied", "with the norm"): _head_with_the_norm,
}


def batch(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A model and 2 pairs, chosen rows first. Process 0 has rows 0 and 2."""
    torch.manual_seed(1)
    model, inputs = MODELS[name]()
    inputs = {key: torch.cat([value, value]) for key, value in inputs.items()}
    inputs["input_ids"][:, -TEXT_TOKENS:] = torch.randint(10, 40, (4, TEXT_TOKENS))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -TEXT_TOKENS - 1 : -1] = inputs["input_ids"][:, -TEXT_TOKENS:]
    return model, inputs, labels


def share(inputs: dict[str, Tensor], labels: Tensor, rank: int) -> tuple[dict[str, Tensor], Tensor]:
    """The rows of one process. Image patches belong to the row of their image."""

    def rows(value: Tensor) -> Tensor:
        per_row = value.unflatten(0, (4, -1))
        return per_row[[rank, 2 + rank]].flatten(0, 1)

    return {key: rows(value) for key, value in inputs.items()}, rows(labels)


def train(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, references: Tensor) -> dict:
    """Train `STEPS` steps. Returns the loss of each, the gradients of the first and the weights after the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, grads = [], {}
    for step in range(STEPS):
        loss = model(
            **inputs,
            head_op=lambda hidden, head: linear_cwdpo_loss(
                hidden, head, labels, *references, beta=0.5, cooling=COOLING
            ),
        ).loss
        loss.backward()
        losses.append(mean_over_processes(loss.detach()))
        if step == 0:
            grads = {name: gathered(value.grad) for name, value in model.named_parameters() if value.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: gathered(value.detach()) for name, value in model.named_parameters()}
    return {"losses": losses, "grads": grads, "weights": weights}


def gathered(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def mean_over_processes(loss: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(loss, op=dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
        loss = loss / dist.get_world_size()
    return loss.item()


REFERENCES = torch.tensor([[-20.0, -21.0], [-22.0, -19.0]])  # [chosen or rejected, pair]


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    for name in MODELS:
        model, inputs, labels = batch(name)
        attach_head(model)
        mine = share(inputs, labels, rank)
        # Some vision towers have a layer whose output the language model never uses.
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
        found = train(wrapped, *mine, REFERENCES[:, rank : rank + 1])
        for key in ("grads", "weights"):
            found[key] = {parameter.removeprefix("module."): value for parameter, value in found[key].items()}
        results[name, "ddp"] = found
    del wrapped  # DDP must not outlive the group (tests/test_transforms.py)
    for (name, layout), shard in LAYOUTS.items():
        model, inputs, labels = batch(name)
        attach_head(model)
        shard(model)
        results[name, layout] = train(model, *share(inputs, labels, rank), REFERENCES[:, rank : rank + 1])
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
