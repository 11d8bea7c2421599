"""Launch configurations: rows for chip, precision and hidden size, and the functions that select a row.

`source` says how a row was chosen: by timing (see docs/notes.md), or by cross-compilation only ("compiled"): no spills,
tensor-core instructions, and shared memory within the chip's limit (benchmarks/results/triton_compiled.json).
`python -m benchmarks.tune` times candidates on a GPU and prints rows to paste here.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class TileConfig:
    """A tile of logits: BLOCK_N tokens x BLOCK_V vocabulary entries, in steps of BLOCK_D hidden dimensions."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_n: int = 16  # row blocks that run together on one vocabulary block, so that it stays in the L2 cache
    persistent: bool = False  # one program per multiprocessor loops over tiles; else one program per tile
    descriptors: bool = False  # use tensor descriptors (TMA) if the layout allows it
    narrow_statistics: bool = False  # halve block_v where a sweep also sums statistics: else registers spill
    source: str = "compiled"


ANY_D = math.inf
# Key: chip, precision of the operands, and the largest hidden size D that the row is for. "half" is bfloat16 or
# float16; "tf32" and "ieee" are float32.
TILES: dict[tuple[str, str, float], TileConfig] = {
    ("sm_80", "half", ANY_D): TileConfig(128, 128, 64, num_warps=8, num_stages=3),
    ("sm_80", "tf32", ANY_D): TileConfig(128, 128, 32, num_warps=8, num_stages=3),
    ("sm_80", "ieee", ANY_D): TileConfig(64, 64, 16, num_warps=8, num_stages=2, narrow_statistics=True),
    ("sm_90", "half", 1024): TileConfig(
        128, 128, 64, 4, 3, descriptors=True, narrow_statistics=True, source="timed on an H100, D 576"
    ),
    ("sm_90", "half", ANY_D): TileConfig(128, 256, 64, 8, 3, descriptors=True, source="timed on an H100, D 4096"),
    ("sm_90", "tf32", ANY_D): TileConfig(128, 128, 32, num_warps=8, num_stages=4, descriptors=True),
    ("sm_90", "ieee", ANY_D): TileConfig(64, 64, 16, num_warps=8, num_stages=2, narrow_statistics=True),
    ("sm_100", "half", ANY_D): TileConfig(128, 256, 64, 8, 3, descriptors=True, narrow_statistics=True),
    ("sm_100", "tf32", ANY_D): TileConfig(128, 128, 32, num_warps=8, num_stages=4, descriptors=True),
    ("sm_100", "ieee", ANY_D): TileConfig(64, 64, 16, num_warps=8, num_stages=2, narrow_statistics=True),
    ("gfx942", "half", ANY_D): TileConfig(128, 128, 64, num_warps=8, num_stages=2),
    ("gfx942", "tf32", ANY_D): TileConfig(128, 128, 32, num_warps=8, num_stages=2),
    ("gfx942", "ieee", ANY_D): TileConfig(64, 64, 16, num_warps=8, num_stages=2),
    # Small tiles for the interpreter, so that small test shapes have several tiles, whole and partial.
    ("interpreter", "half", ANY_D): TileConfig(32, 128, 64, 4, 1, group_n=2, persistent=True, descriptors=True),
    ("interpreter", "tf32", ANY_D): TileConfig(32, 128, 64, 4, 1, group_n=2, descriptors=True),
    ("interpreter", "ieee", ANY_D): TileConfig(32, 128, 64, 4, 1, group_n=2, descriptors=True),
}
ROUNDS_TO_TF32 = "round_f32_to_tf32" in {field.name for field in fields(TensorDescriptor)}
MIN_BLOCK_V = 32
PERSISTENT_PROGRAMS_INTERPRETED = 3
# Every launch passes these. enable_fp_fusion lets the compiler fuse a multiply and an add into one instruction that
# rounds once. It is the default up to Triton 3.9 but not from 3.10 on, where results and speed would change without it.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


@functools.cache
def architecture(device: torch.device) -> str:
    """The name of a device's chip, such as "sm_89" or "gfx942"."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def rows_of(architecture: str) -> str:
    """The chip whose rows of TILES an architecture uses: its own, or the newest one before it that fits its memory."""
    if architecture.startswith("gfx"):
        return "gfx942"
    generation = int(architecture.removeprefix("sm_")[:-1])
    if generation < 8:
        raise NotImplementedError(
            f"the Triton backend: expected compute capability 8.0 or newer, got {generation}.{architecture[-1]}"
        )
    # 8.6, 8.9 and 12.x have 99 KiB of shared memory and no wgmma. The rows of sm_80 take 64 KiB.
    return {9: "sm_90", 10: "sm_100"}.get(generation, "sm_80")


@functools.cache
def chip(device: torch.device) -> str:
    """The chip whose rows of TILES a device uses."""
    return "interpreter" if interpreted() else rows_of(architecture(device))


def has_tf32() -> bool:
    """Whether the current device multiplies in tf32. Of AMD's chips gfx942 does, and gfx90a and gfx950 do not."""
    return not torch.version.hip or architecture(torch.device("cuda", torch.cuda.current_device())) == "gfx942"


def precision() -> str:
    """input_precision of tl.dot on float32 operands, as set in torch.backends.cuda.matmul; "ieee" without tf32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and has_tf32() else "ieee"


def row_for(chip: str, precision: str, dim: int) -> TileConfig:
    """The row of TILES for a hidden size: of those for at least this size, the one for the smallest."""
    sizes = [size for *key, size in TILES if key == [chip, precision] and dim <= size]
    return TILES[chip, precision, min(sizes)]


def tile_config(
    hidden: Tensor, *softcaps: float | None, column_divisor: int = 1, statistics: bool = False
) -> TileConfig:
    """The row for these operands, with block_v divided by `column_divisor`.

    Epilogues that need many registers use fewer columns, and half the rows where a tile cannot be narrower. A soft cap
    divides block_v by at least 2, and so do `statistics` in rows that say so.
    """
    kind = precision() if hidden.dtype == torch.float32 else "half"
    config = row_for(chip(hidden.device), kind, hidden.shape[1])
    if any(softcap is not None for softcap in softcaps) or (statistics and config.narrow_statistics):
        column_divisor = max(column_divisor, 2)
    block_v = config.block_v // column_divisor
    block_n = config.block_n if block_v >= MIN_BLOCK_V else config.block_n // 2
    return replace(config, block_n=block_n, block_v=max(block_v, MIN_BLOCK_V))


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors, which is the number of programs of a persistent launch."""
    if interpreted():
        return PERSISTENT_PROGRAMS_INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count


def grid(config: TileConfig, tiles: int, device: torch.device) -> tuple[int]:
    """The launch grid of a kernel that loops over `tiles`."""
    return (max(min(tiles, multiprocessors(device)) if config.persistent else tiles, 1),)


def wave(config: TileConfig, rows: int, device: torch.device) -> int:
    """The number of vocabulary tiles, of all `rows`, that the multiprocessors work on at once; 0 without rows."""
    return triton.cdiv(multiprocessors(device), triton.cdiv(rows, config.block_n)) if rows else 0


def operands(
    hidden: Tensor, weight: Tensor, block_n: int, block_v: int, block_d: int, descriptors: bool
) -> tuple[dict, bool]:
    """The kernel arguments for both matrices and their strides, and whether the matrices are tensor descriptors."""
    strides = {
        "stride_hidden_n": hidden.stride(0), "stride_hidden_d": hidden.stride(1),
        "stride_weight_v": weight.stride(0), "stride_weight_d": weight.stride(1),
    }  # fmt: skip
    descriptors = descriptors and _supports_descriptor(hidden) and _supports_descriptor(weight)
    if descriptors:
        rounding = _rounding(hidden)
        hidden = TensorDescriptor.from_tensor(hidden, [block_n, block_d], **rounding)
        weight = TensorDescriptor.from_tensor(weight, [block_v, block_d], **rounding)
    return {"hidden": hidden, "weight": weight, **strides}, descriptors


def _rounding(matrix: Tensor) -> dict[str, bool]:
    """Loads round float32 to tf32 if products are in tf32: tensor cores would truncate. Triton does it from 3.7 on."""
    wanted = matrix.dtype == torch.float32 and precision() == "tf32" and not interpreted()
    return {"round_f32_to_tf32": True} if wanted and ROUNDS_TO_TF32 else {}


def _supports_descriptor(matrix: Tensor) -> bool:
    """Tensor descriptors need at least one row, 16-byte aligned rows and contiguous entries within a row."""
    itemsize = matrix.element_size()
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * itemsize % 16 == 0
    return aligned and matrix.stride(1) == 1 and matrix.numel() > 0
