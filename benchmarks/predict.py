"""Records the launches of steps on meta tensors and adds up their work (see cycles.py). No GPU is needed.

`python -m benchmarks.predict` writes benchmarks/results/predicted.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from unittest import mock

import torch
from torch import Tensor
from triton import cdiv
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import compiled, compiled_checks, cycles
from benchmarks.cycles import Step
from benchmarks.models import SHAPES, Shape
from cwdpo_kernels import IGNORE_INDEX
from cwdpo_kernels.ops.checks import UNINITIALIZED
from cwdpo_kernels.triton import linear_logprob
from cwdpo_kernels.triton.gemm import DenseGemm

CHIP = "sm_90"
# The share of the tiles and of their sums that rescaling moves: measured on an H200 (SmolVLM) and an H100 (A).
RESCALED = {torch.bfloat16: 0.2, torch.float32: 0.1}
TILES_OF = {"_rescale_kernel": "matrix_ptr", "_finish_kernel": "tile_ptr"}  # kernel -> what it rescales
MODES = {  # op of gpu.json -> whether the head is frozen, bytes to keep; None: no gradient
    "no_grad": None,
    "frozen": (True, 0),
    "trainable": (False, UNINITIALIZED),
    "trainable, none kept": (False, 0),
    "trainable, 4 GiB kept": (False, 4 << 30),
}


def add(step: Step, launch: tuple, rows: list[dict]) -> None:
    """Add a recorded launch of one of our kernels."""
    kernel, arguments, _ = launch
    name = kernel.__name__
    step.launches += 1
    if name in compiled_checks.TILE_KERNELS:
        row = row_of(name, arguments, rows)
        constants = row["constants"]
        tiles_v = arguments["end_tile_v"] - arguments["first_tile_v"]
        waves = cdiv(cdiv(arguments["N"], constants["BLOCK_N"]) * tiles_v, cycles.MULTIPROCESSORS)
        step.cycles += waves * cycles.tile_cycles(row, arguments["D"])
        return
    given = (x.base if isinstance(x, TensorDescriptor) else x for x in arguments.values())
    tensors = [x for x in given if isinstance(x, Tensor) and x.shape[:1] != (arguments.get("V"),)]  # not the head
    moved = sum(x.numel() * x.itemsize for x in tensors)
    rescaled = arguments[TILES_OF[name]].dtype if name in TILES_OF else None
    step.bytes += moved * 2 * RESCALED[rescaled] if rescaled else moved  # rescaling reads and writes


def row_of(name: str, arguments: dict, rows: list[dict]) -> dict:
    """The row of the report for a launch: the same kernel with the same constants."""

    def fits(row: dict) -> bool:
        same = (row["chip"], row["kernel"]) == (CHIP, name) and "before_matrix" in row
        return same and all(arguments.get(key) == value for key, value in row["constants"].items())

    found = next(filter(fits, rows), None)
    if found is None:
        raise ValueError(f"predict: expected the compiled report to have {name} as launched; run benchmarks.compiled")
    return found


@contextmanager
def _vendor_products(step: Step) -> Iterator[None]:
    """Count the products of DenseGemm instead of computing them."""

    def count(out: Tensor, a: Tensor, b: Tensor) -> None:
        step.flops += 2.0 * a.shape[0] * a.shape[1] * b.shape[1]
        step.launches += 1

    with mock.patch.object(DenseGemm, "accumulate", count), mock.patch.object(DenseGemm, "product", count):
        yield


def step_of(shape: Shape, mode: str, rows: list[dict]) -> Step:
    """The work of a step: forward, and backward unless the mode is "no_grad"."""
    n, v, d = shape.tokens, shape.vocab, shape.dim
    step = Step()
    with torch.device("meta"), _vendor_products(step), compiled.recorded(CHIP, "ieee") as launches:
        hidden, weight = (torch.empty(size, d, dtype=torch.bfloat16) for size in (n, v))
        head = (hidden, weight, None, torch.empty(n, dtype=torch.int64), 1.0, None, IGNORE_INDEX)
        # The caller gathers the labeled rows, and scatters their gradients.
        step.bytes += (2 if mode == "no_grad" else 6) * n * d * hidden.itemsize
        frozen, kept_bytes = MODES[mode] or (False, 0)
        if kept_bytes > 0:
            kept_bytes = min(kept_bytes, n * v * hidden.itemsize)
        logp, anchor, sum_exp, _, kept = linear_logprob.linear_logprob(*head, frozen, False, 0, kept_bytes)
        if MODES[mode] and not frozen:
            saved = (logp, *head[:4], logp, anchor, sum_exp, kept, *head[4:], True)
            if kept_bytes == UNINITIALIZED:
                linear_logprob.linear_logprob_backward_(*saved, False, False, 0)
            else:
                linear_logprob.linear_logprob_backward(*saved, True, False, False, 0)
            step.bytes += 3 * n * d * 4  # fills grad_hidden, and converts it
    for launch in launches:
        add(step, launch, rows)
    return step


def document(rows: list[dict]) -> dict:
    """The work of every step, in integers."""
    steps = []
    for shape in SHAPES:
        for mode in MODES:
            work = {name: round(value) for name, value in asdict(step_of(shape, mode, rows)).items()}
            steps.append({"shape": shape.name, "op": mode, "work": work})
    return {"steps": steps}


def main() -> None:
    found = document(json.loads(compiled.RESULTS.read_text())["kernels"])
    cycles.FILE.write_text(json.dumps(found, indent=1) + "\n")
    for (shape, op), ms in cycles.predicted_ms(cycles.PUBLISHED_MS).items():
        print(f"{shape:18}{op:24}{ms:9.3f} ms")


if __name__ == "__main__":
    main()
