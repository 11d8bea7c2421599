"""Launch configurations: one row per chip and precision, and the functions that select a row.

`source` says how a row was chosen. "compiled" means by cross-compilation only: no spills, tensor-core instructions and
shared memory within the chip's limit (benchmarks/results/triton_compiled.json), but no timing.
`python -m benchmarks.tune` times candidates on a GPU and prints rows to paste here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

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
    source: str = "compiled"


# Key: chip, precision of the operands. "half" is bfloat16 or float16; "tf32" and "ieee" are float32.
TILES: dict[tuple[str, str], TileConfig] = {
    ("sm_80", "half"): TileConfig(128, 128, 64, num_warps=8, num_stages=3),
    ("sm_80", "tf32"): TileConfig(128, 128, 32, num_warps=8, num_stages=3),
    ("sm_80", "ieee"): TileConfig(64, 64, 16, num_warps=8, num_stages=2),
    ("sm_90", "half"): TileConfig(128, 256, 64, num_warps=8, num_stages=3, descriptors=True),
    ("sm_90", "tf32"): TileConfig(128, 128, 32, num_warps=8, num_stages=4, descriptors=True),
    ("sm_90", "ieee"): TileConfig(64, 64, 16, num_warps=8, num_stages=2),
    ("sm_100", "half"): TileConfig(128, 256, 64, num_warps=8, num_stages=3, descriptors=True),
    ("sm_100", "tf32"): TileConfig(128, 128, 32, num_warps=8, num_stages=4, descriptors=True),
    ("sm_100", "ieee"): TileConfig(64, 64, 16, num_warps=8, num_stages=2),
    ("gfx942", "half"): TileConfig(128, 128, 64, num_warps=8, num_stages=2),
    ("gfx942", "tf32"): TileConfig(128, 128, 32, num_warps=8, num_stages=2),
    ("gfx942", "ieee"): TileConfig(64, 64, 16, num_warps=8, num_stages=2),
    # Small tiles for the interpreter, so that small test shapes have several tiles, whole and partial.
    ("interpreter", "half"): TileConfig(32, 128, 64, 4, 1, group_n=2, persistent=True, descriptors=True),
    ("interpreter", "tf32"): TileConfig(32, 128, 64, 4, 1, group_n=2, descriptors=True),
    ("interpreter", "ieee"): TileConfig(32, 128, 64, 4, 1, group_n=2, descriptors=True),
}
MIN_BLOCK_V = 32
PERSISTENT_PROGRAMS_INTERPRETED = 3
# Every launch passes these. enable_fp_fusion lets the compiler fuse a multiply and an add into one instruction that
# rounds once. It is the default up to Triton 3.9 but not from 3.10 on, where results and speed would change without it.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


@functools.cache
def chip(device: torch.device) -> str:
    """The chip whose rows of TILES a device uses: its own generation, or the newest one before it."""
    if interpreted():
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    if major < 8:
        raise NotImplementedError(f"the Triton backend: expected compute capability 8.0 or newer, got {major}.x")
    return "sm_100" if major == 10 else "sm_90" if major == 9 else "sm_80"


def precision() -> str:
    """input_precision of tl.dot on float32 operands, as set in torch.backends.cuda.matmul."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tile_config(hidden: Tensor, *softcaps: float | None, column_divisor: int = 1) -> TileConfig:
    """The row for these operands, with block_v divided by `column_divisor`.

    Epilogues that need many registers use fewer columns, and half the rows where a tile cannot be narrower. A soft cap
    divides block_v by at least 2.
    """
    kind = precision() if hidden.dtype == torch.float32 else "half"
    config = TILES[chip(hidden.device), kind]
    if any(softcap is not None for softcap in softcaps):
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
        hidden = TensorDescriptor.from_tensor(hidden, [block_n, block_d])
        weight = TensorDescriptor.from_tensor(weight, [block_v, block_d])
    return {"hidden": hidden, "weight": weight, **strides}, descriptors


def _supports_descriptor(matrix: Tensor) -> bool:
    """Tensor descriptors need at least one row, 16-byte aligned rows and contiguous entries within a row."""
    itemsize = matrix.element_size()
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * itemsize % 16 == 0
    return aligned and matrix.stride(1) == 1 and matrix.numel() > 0
