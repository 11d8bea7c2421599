"""Compiles the persistent sweep and gradient kernels for sm_90 and prints the loops of each, as JSON.

`tests/test_triton_loops.py` runs this in a process of its own, because Triton may be its interpreter there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
import triton

from benchmarks import compiled
from cwdpo_kernels.triton import configs, linear_logprob

CHIP, PRODUCT, STORE = "sm_90", "ttng.warp_group_dot ", "tt.store "


def persistent_launches(sparse_grad: bool) -> dict[str, tuple]:
    """The kernels of a step, launched as loops over tiles: name -> kernel, arguments, launch options."""
    rows = {key: replace(row, persistent=True) for key, row in configs.TILES.items() if key[0] == CHIP}
    with (
        mock.patch.dict(configs.TILES, rows),
        compiled.recorded(CHIP, "ieee") as launches,
        torch.device("meta"),
    ):
        hidden, weight = (torch.empty(size, 576, dtype=torch.bfloat16) for size in (4096, 49280))
        labels = torch.empty(4096, dtype=torch.int64)
        head = (hidden, weight, None, labels, 1.0, None, -100)
        logp, anchor, sum_exp, _, kept = linear_logprob.linear_logprob(*head, False, sparse_grad, 0, 0)
        linear_logprob.linear_logprob_backward(
            logp, *head[:4], logp, anchor, sum_exp, kept, *head[4:], True, True, False, sparse_grad, 0
        )
    return {kernel.__name__: (kernel, arguments, options) for kernel, arguments, options in launches}


def loops(ttgir: str) -> Iterator[dict]:
    """Per loop: whether it contains a product, how many loops enclose it, and its stores, unconditional and all."""
    regions: list[tuple[str, dict | None]] = []
    for line in map(str.strip, ttgir.splitlines()):
        if line.startswith("}") and not line.startswith("} else"):
            _, loop = regions.pop()
            if loop is not None:
                yield loop
        around = [i for i, (_, loop) in enumerate(regions) if loop is not None]
        for i in around:
            loop, inside = regions[i][1], [name for name, _ in regions[i:]]
            loop["product"] |= PRODUCT in line
            loop["stores"] += line.startswith(STORE)
            loop["unconditional"] += line.startswith(STORE) and "if" not in inside
        if line.endswith("{") and not line.startswith("} else"):
            new = {"product": False, "depth": len(around), "stores": 0, "unconditional": 0}
            is_loop, is_if = "scf.for " in line, "scf.if " in line
            regions.append(("for" if is_loop else "if" if is_if else "other", new if is_loop else None))


def main() -> None:
    found = {}
    for name, sparse_grad in (("_sweep_kernel", False), ("_gradient_kernel", False), ("_sweep_kernel", True)):
        kernel, arguments, options = persistent_launches(sparse_grad)[name]
        source = compiled.source_of(kernel, arguments)
        code = triton.compile(source, target=compiled.TARGETS[CHIP], options=options).asm["ttgir"]
        found[f"{name}, sparse_grad {sparse_grad}"] = list(loops(code))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
