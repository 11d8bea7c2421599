"""Compiles every Triton kernel with every shipped configuration and reports what it compiles to. No GPU is needed.

The ops are called on meta tensors of realistic sizes, once for each chip. Their launches are recorded, not run, and
every recorded launch is compiled for the chip. The report lists registers and spills per thread, shared memory, the
number of tensor-core and TMA instructions and, on NVIDIA chips, the instructions of a tile (see sass.py).

`python -m benchmarks.compiled [--out FILE] [--chip sm_90 ...]` writes the report. It writes none if a kernel misses a
requirement, or if one got worse (see compiled_checks.py): then say why with `--worse REASON`, which the report keeps.
Chips that use the launch configurations of another one are compiled for if they are named: `--chip sm_89 --out FILE`.
`--quick` lists all launches, but compiles only the matrix products on sm_90 in bfloat16, each kind once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import compiled_checks, sass
from cwdpo_kernels import IGNORE_INDEX
from cwdpo_kernels.triton import (
    configs,
    constrained_sft_loss,
    cwdpo_loss,
    linear_logprob,
    logits_logprob,
    sequence_logprob,
    softmax_sums,
    token_divergence,
)

RESULTS = Path(__file__).parent / "results" / "triton_compiled.json"
CHIPS = ("sm_80", "sm_90", "sm_100", "gfx942")  # with launch configurations of their own
TARGETS = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 86, 89, 90, 100, 120, 121)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx90a", "gfx942", "gfx950")},
}
# Tokens, vocabulary, hidden: a 7B model, and a small one for rows of configs.TILES that are for small hidden sizes.
SHAPES = ((8192, 151936, 4096), (4096, 49280, 576))
CASES = (  # precision, dtype, bias, soft cap
    ("half", torch.bfloat16, False, None),
    ("half", torch.float16, True, 30.0),
    ("tf32", torch.float32, True, None),
    ("ieee", torch.float32, True, None),
)
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
        mock.patch.object(configs, "chip", return_value=configs.rows_of(chip)),
        mock.patch.object(configs, "has_tf32", return_value=chip not in compiled_checks.WITHOUT_TF32),
        mock.patch.object(configs, "multiprocessors", return_value=132),
    ):
        yield launches


def call_every_op(
    dtype: torch.dtype, *, bias: bool = False, softcap: float | None = None, shape: tuple[int, int, int] = SHAPES[0]
) -> None:
    """Call all ops on meta tensors; `shape` is N, V, D."""
    (n, v, d), pairs = shape, 4
    with torch.device("meta"):
        hidden, weight = torch.empty(n, d, dtype=dtype), torch.empty(v, d, dtype=dtype)
        bias_vector = torch.empty(v, dtype=dtype) if bias else None
        labels, logp = torch.empty(n, dtype=torch.int64), torch.empty(n)
        cu_seqlens, refs = torch.empty(2 * pairs + 1, dtype=torch.int64), torch.empty(pairs)
    head = (hidden, weight, bias_vector, labels, 1.0, softcap, IGNORE_INDEX)
    linear_logprob.linear_logprob(*head, True, False, 0, 0)
    *_, kept = linear_logprob.linear_logprob(*head, False, False, 0, n * v * dtype.itemsize // 3)  # part of the tiles
    for sparse_grad in (False, True):
        linear_logprob.linear_logprob_backward(
            logp, *head[:4], logp, logp, logp, kept, *head[4:], True, True, bias, sparse_grad, 0
        )
    for partial, with_direction in ((False, False), (True, False), (False, True)):
        sums, *_ = softmax_sums.softmax_sums(*head, partial, with_direction, 0, 0)
    softmax_sums.softmax_sums_backward(
        logp, logp, logp, *head[:4], sums[1], kept, *head[4:], False, True, True, bias, 0
    )
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


@functools.cache
def digest(kernel: JITFunction) -> str:
    """Of the code of a kernel and of all that it calls or reads in our modules. Comments do not count."""
    seen: dict[int, str] = {}

    def visit(name: str, value: object) -> None:
        if isinstance(value, tl.constexpr):
            seen[id(value)] = f"{name} = {value.value!r}"
        elif isinstance(value, JITFunction) and value.__module__.startswith("cwdpo_kernels") and id(value) not in seen:
            tree = ast.parse(value.src)
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                    del node.body[0]
            seen[id(value)] = ast.unparse(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Name) and node.id in value.fn.__globals__:
                    visit(node.id, value.fn.__globals__[node.id])

    visit(kernel.__name__, kernel)
    return hashlib.sha256("\n".join(sorted(seen.values())).encode()).hexdigest()[:16]


def launches(chip: str) -> list[tuple[dict, JITFunction, dict, dict]]:
    """Every launch on a chip: the start of its row, the kernel, its arguments and its launch options.

    Launches that differ in sizes alone compile to the same instructions, so only the first of them is here. Of a chip
    that uses the rows of another one, only the matrix products are here.
    """
    found: dict[str, tuple[dict, JITFunction, dict, dict]] = {}
    for shape in SHAPES:
        for kind, dtype, bias, softcap in CASES:
            with recorded(chip, "ieee" if kind == "half" else kind) as calls:
                call_every_op(dtype, bias=bias, softcap=softcap, shape=shape)
            for kernel, arguments, options in calls:
                constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}
                if configs.rows_of(chip) != chip and kernel.__name__ not in compiled_checks.GEMM_KERNELS:
                    continue  # the same code as on the chip whose rows it uses
                row = {
                    "chip": chip, "precision": kind, "dim": shape[2], "kernel": kernel.__name__,
                    "digest": digest(kernel), "constants": constants, **options,
                }  # fmt: skip
                key = json.dumps([{**row, "dim": None}, source_of(kernel, arguments).signature])
                found.setdefault(key, (row, kernel, arguments, options))
    return list(found.values())


def measure(row: dict, kernel: JITFunction, arguments: dict, options: dict) -> dict:
    """The row of a launch with what the kernel compiles to."""
    chip = row["chip"]
    compiled = triton.compile(source_of(kernel, arguments), target=TARGETS[chip], options=options)
    code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    row |= {
        "shared_bytes": compiled.metadata.shared,
        **(_cuda_resources if TARGETS[chip].backend == "cuda" else _amd_resources)(compiled),
        "matrix_instructions": code.count(compiled_checks.TENSOR_CORE[chip]),
        "tma_instructions": code.count(compiled_checks.TMA),
    }  # fmt: skip
    if "cubin" in compiled.asm and row["kernel"] in compiled_checks.TILE_KERNELS:
        row |= sass.counts(sass.disassembled(compiled.asm["cubin"]), row["constants"]["FLATTEN"])
        row["instructions_per_element"] = round(row["tile_instructions"] / compiled_checks.elements(row), 2)
    return row


def _cuda_resources(compiled) -> dict:
    usage = sass.tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
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


def compile_chip(chip: str, quick: bool = False) -> list[dict]:
    """The rows of a chip. If `quick`, only the main matrix products are compiled; the other rows have no measures."""
    rows, done = [], set()
    for row, *launch in launches(chip):
        kind = compiled_checks.name_of({**row, "dim": 0})  # one hidden size is enough if quick
        main = chip == "sm_90" and row["precision"] == "half" and row["kernel"] in compiled_checks.TILE_KERNELS
        main = main and "SOFTCAP" not in kind and kind not in done
        rows.append(measure(row, *launch) if main or not quick else row)
        done.add(kind)
    return rows


def write(path: Path, rows: list[dict], worse: list[str]) -> None:
    """One row a line, so that a change of a kernel changes its lines."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = f'"triton": {json.dumps(triton.__version__)},\n"worse": {json.dumps(worse, indent=1)}'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{{head},\n"kernels": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--chip", nargs="+", choices=TARGETS, default=list(CHIPS))
    parser.add_argument("--worse", metavar="REASON", help="why kernels got worse")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        chips = pool.map(compile_chip, options.chip, [options.quick] * len(options.chip))
        rows = [row for chip_rows in chips for row in chip_rows]
    compiled = [row for row in rows if "registers" in row]
    show(compiled)
    before = json.loads(options.out.read_text()) if options.out.exists() else {"triton": None, "kernels": []}
    same = before["triton"] == triton.__version__
    worse = compiled_checks.worse(before["kernels"], compiled) if same else []
    problems = [problem for row in compiled for problem in compiled_checks.failures(row)]
    if worse and not options.worse:
        problems += [*worse, "compiled: expected no kernel to get worse. If that is meant, say why: --worse REASON"]
    if problems:
        sys.exit("\n".join(problems))
    reasons = [f"{change}: {options.worse}" for change in worse]
    write(options.out, rows, [*before.get("worse", []), *reasons])
    if options.out == RESULTS:
        from benchmarks import predict  # imports this module

        predict.main()
        print("compiled: predictions were written too; python -m benchmarks.report brings them to docs/benchmarks.md")


def show(rows: list[dict]) -> None:
    columns = {
        "registers": "registers", "spill": "spill_bytes", "shared": "shared_bytes", "matrix": "matrix_instructions",
        "TMA": "tma_instructions", "an element": "instructions_per_element", "to TMA": "before_tma",
    }  # fmt: skip
    print(f"{'kernel':70}" + "".join(f"{title:>12}" for title in columns))
    for row in rows:
        cells = (row.get(key) for key in columns.values())
        print(f"{compiled_checks.name_of(row):70}" + "".join(f"{'' if x is None else x:>12}" for x in cells))


if __name__ == "__main__":
    main()
