"""Compiles every Triton kernel with every shipped configuration and reports the resources it uses. No GPU is needed.

The ops are called on meta tensors of a realistic size, once for each chip. Their launches are recorded, not run, and
every recorded launch is compiled for the chip. The report lists registers and spills per thread, shared memory, and the
number of tensor-core and TMA instructions.

`python -m benchmarks.compiled [--out FILE] [--chip sm_90 ...]` writes the report. It fails if a kernel misses a
requirement (see `failures`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from cwdpo_kernels import IGNORE_INDEX
from cwdpo_kernels.triton import (
    configs,
    constrained_sft_loss,
    cwdpo_loss,
    linear_logprob,
    logits_logprob,
    sequence_logprob,
    token_divergence,
    token_stats,
)

RESULTS = Path(__file__).parent / "results" / "triton_compiled.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# The matrix instruction of each chip.
TENSOR_CORE = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
TMA = "cp.async.bulk.tensor"
POINTER_KERNELS = ("_block_sparse_kernel", "_block_sparse_transposed_kernel")  # load through pointers, not TMA
GEMM_KERNELS = ("_sweep_kernel", "_gradient_kernel", "_divergence_kernel", *POINTER_KERNELS)
STRICT_CHIPS = ("sm_90", "sm_100")  # GEMM kernels must not spill and must load through TMA
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
LAUNCH_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@contextlib.contextmanager
def recorded(chip: str, precision: str) -> Iterator[list]:
    """Record launches as (kernel, arguments by name, launch options) instead of running them."""
    launches: list = []

    def record(kernel: JITFunction, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
        launches.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

    torch.backends.cuda.matmul.fp32_precision = precision  # not restored: this process only compiles
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(configs, "chip", return_value=chip),
        mock.patch.object(configs, "multiprocessors", return_value=132),
    ):
        yield launches


def call_every_op(dtype: torch.dtype, *, bias: bool = False, softcap: float | None = None) -> None:
    """Call all ops on meta tensors with N 8192, V 151936, D 4096 (a 7B model)."""
    n, v, d, pairs = 8192, 151936, 4096, 4
    with torch.device("meta"):
        hidden, weight = torch.empty(n, d, dtype=dtype), torch.empty(v, d, dtype=dtype)
        bias_vector = torch.empty(v, dtype=dtype) if bias else None
        labels, logp = torch.empty(n, dtype=torch.int64), torch.empty(n)
        cu_seqlens, refs = torch.empty(2 * pairs + 1, dtype=torch.int64), torch.empty(pairs)
    head = (hidden, weight, bias_vector, labels, 1.0, softcap, IGNORE_INDEX)
    linear_logprob.linear_logprob(*head, True, False, 0, 0)
    *_, kept = linear_logprob.linear_logprob(*head, False, False, 0, 1 << 30)
    for sparse_grad in (False, True):
        linear_logprob.linear_logprob_backward(
            logp, *head[:4], logp, logp, logp, kept, *head[4:], True, True, bias, sparse_grad, 0
        )
    token_stats.token_stats(*head, 0)
    token_divergence.token_divergence(*head[:3], 1.0, softcap, *head[:3], 1.0, softcap, 0)
    if not bias:
        logits = torch.empty(n, v, dtype=dtype, device="meta")
        logits_logprob.logits_logprob(logits, labels, IGNORE_INDEX, False)
        logits_logprob.logits_logprob_backward(logp, logits, labels, logp, logp, logp, IGNORE_INDEX)
        sum_logp, _, count = sequence_logprob.sequence_logprob(logp, labels, cu_seqlens, IGNORE_INDEX)
        sequence_logprob.sequence_logprob_backward(sum_logp, sum_logp, labels, count, cu_seqlens, IGNORE_INDEX)
        for drop, constant, per_token in ((None, None, False), (-9.0, 0.5, True)):
            cooling = (0.1, -3.0, 1.0, constant, drop, per_token, IGNORE_INDEX)
            cwdpo_loss.cwdpo_loss(logp, labels, None, cu_seqlens, refs, refs, *cooling)
        constrained_sft_loss.constrained_sft_loss(logp, labels, None, cu_seqlens, 0.1, 3.0, "hinge", True, IGNORE_INDEX)


def source_of(kernel: JITFunction, arguments: dict) -> ASTSource:
    """The kernel with the specialization of a launch: ones are constants, multiples of 16 are marked as divisible."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def measure(chip: str, kind: str, kernel: JITFunction, arguments: dict, options: dict) -> dict:
    compiled = triton.compile(source_of(kernel, arguments), target=TARGETS[chip], options=options)
    code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
    return {
        "chip": chip, "precision": kind, "kernel": kernel.__name__, "constants": constants, **options,
        "shared_bytes": compiled.metadata.shared, **(_cuda_resources if chip != "gfx942" else _amd_resources)(compiled),
        "matrix_instructions": code.count(TENSOR_CORE[chip]), "tma_instructions": code.count(TMA),
    }  # fmt: skip


def _cuda_resources(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"registers": _number(r"REG:(\d+)", usage), "spill_bytes": _number(r"STACK:(\d+)", usage)}


def _amd_resources(compiled) -> dict:
    code = compiled.asm["amdgcn"]
    spilled = _number(r"\.vgpr_spill_count:\s*(\d+)", code)
    return {"registers": _number(r"\.vgpr_count:\s*(\d+)", code), "spill_bytes": 4 * spilled}


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"compiled: expected the compiler's output to contain {pattern}, got {text[:200]!r}")
    return int(found[1])


def failures(row: dict) -> list[str]:
    """The requirements that a compiled kernel misses: shared memory, spills, tensor-core instructions, TMA."""
    chip, name = row["chip"], f"{row['chip']} {row['precision']} {row['kernel']} {row['constants']}"
    problems = []
    if row["shared_bytes"] > SHARED_LIMIT[chip]:
        problems.append(f"{name}: {row['shared_bytes']} bytes of shared memory, the limit is {SHARED_LIMIT[chip]}")
    if row["kernel"] in GEMM_KERNELS and not row["constants"].get("KEPT"):
        if chip in STRICT_CHIPS and row["spill_bytes"]:
            problems.append(f"{name}: {row['spill_bytes']} bytes a thread spilled")
        if row["precision"] == "half" and not row["matrix_instructions"]:
            problems.append(f"{name}: no {TENSOR_CORE[chip]}")
        by_pointers = row["kernel"] in POINTER_KERNELS
        if row["precision"] == "half" and chip in STRICT_CHIPS and not by_pointers and not row["tma_instructions"]:
            problems.append(f"{name}: no {TMA}")
    return problems


def compile_chip(chip: str) -> list[dict]:
    cases = [  # precision, dtype, bias, soft cap
        ("half", torch.bfloat16, False, None),
        ("half", torch.float16, True, 30.0),
        ("tf32", torch.float32, True, None),
        ("ieee", torch.float32, True, None),
    ]
    rows, seen = [], set()
    for kind, dtype, bias, softcap in cases:
        with recorded(chip, "ieee" if kind == "half" else kind) as launches:
            call_every_op(dtype, bias=bias, softcap=softcap)
        for kernel, arguments, launch_options in launches:
            key = source_of(kernel, arguments).hash() + str(launch_options)
            if key not in seen:
                seen.add(key)
                rows.append(measure(chip, kind, kernel, arguments, launch_options))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--chip", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        rows = [row for chip_rows in pool.map(compile_chip, options.chip) for row in chip_rows]
    print(f"{'chip':8}{'precision':10}{'kernel':34}{'registers':>10}{'spill':>7}{'shared':>8}{'matrix':>8}{'TMA':>5}")
    for row in rows:
        print(
            f"{row['chip']:8}{row['precision']:10}{row['kernel']:34}{row['registers']:10}{row['spill_bytes']:7}"
            f"{row['shared_bytes']:8}{row['matrix_instructions']:8}{row['tma_instructions']:5}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n")
    problems = [problem for row in rows for problem in failures(row)]
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
