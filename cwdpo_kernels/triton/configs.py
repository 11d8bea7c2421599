"""Launch configurations, a row for each chip and precision, and how an op finds its row.

`source` says where a row comes from. "compiled": chosen by cross-compilation alone (no spills, tensor-core
instructions, shared memory within the chip's limit; see benchmarks/results/triton_compiled.json), never timed.
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
    """A tile of logits: BLOCK_N tokens x BLOCK_V vocabulary entries, BLOCK_D of the hidden size at a time."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_n: int = 16  # row blocks that share a vocabulary block in the cache
    persistent: bool = False  # one program per processor walks many tiles, else one program per tile
    descriptors: bool = False  # tensor descriptors (TMA) where the layout allows them
    source: str = "compiled"


# Keys: chip, kind of the operands. "half" is bfloat16 and float16, "tf32" and "ieee" are float32.
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
    # Small tiles on the CPU, so that small test shapes have several of each kind, whole and cut.
    ("interpreter", "half"): TileConfig(32, 128, 64, 4, 1, group_n=2, persistent=True, descriptors=True),
    ("interpreter", "tf32"): TileConfig(32, 128, 64, 4, 1, group_n=2, descriptors=True),
    ("interpreter", "ieee"): TileConfig(32, 128, 64, 4, 1, group_n=2, descriptors=True),
}
MIN_BLOCK_V = 32
PERSISTENT_PROGRAMS_INTERPRETED = 3
# Every launch passes these. A multiply and an add become one instruction, rounded once: the default up to Triton 3.9,
# but not from 3.10 on, where leaving it out would change our numbers and our speed.
COMPILER_OPTIONS = {"enable_fp_fusion": True}


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


@functools.cache
def chip(device: torch.device) -> str:
    """The row of the table that serves a device: its own generation, or the newest one before it."""
    if interpreted():
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    if major < 8:
        raise NotImplementedError(f"the Triton backend: expected compute capability 8.0 or newer, got {major}.x")
    return "sm_100" if major == 10 else "sm_90" if major == 9 else "sm_80"


def precision() -> str:
    """How tl.dot multiplies: float32 follows torch.backends.cuda.matmul."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tile_config(hidden: Tensor, *softcaps: float | None, narrower: int = 1) -> TileConfig:
    """The row for these operands, with `narrower` times fewer columns where an epilogue needs the registers.

    A soft cap's arithmetic does: it takes half the columns at most.
    """
    kind = precision() if hidden.dtype == torch.float32 else "half"
    config = TILES[chip(hidden.device), kind]
    if any(softcap is not None for softcap in softcaps):
        narrower = max(narrower, 2)
    return replace(config, block_v=max(config.block_v // narrower, MIN_BLOCK_V))


def processors(device: torch.device) -> int:
    """How many programs run at once when each takes a processor of its own."""
    if interpreted():
        return PERSISTENT_PROGRAMS_INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count


def grid(config: TileConfig, tiles: int, device: torch.device) -> tuple[int]:
    return (max(min(tiles, processors(device)) if config.persistent else tiles, 1),)


def operands(
    hidden: Tensor, weight: Tensor, block_n: int, block_v: int, block_d: int, descriptors: bool
) -> tuple[dict, bool]:
    """The two matrices as a kernel takes them, with their strides: descriptors, or pointers where those cannot be."""
    strides = {
        "stride_hidden_n": hidden.stride(0), "stride_hidden_d": hidden.stride(1),
        "stride_weight_v": weight.stride(0), "stride_weight_d": weight.stride(1),
    }  # fmt: skip
    descriptors = descriptors and _describable(hidden) and _describable(weight)
    if descriptors:
        hidden = TensorDescriptor.from_tensor(hidden, [block_n, block_d])
        weight = TensorDescriptor.from_tensor(weight, [block_v, block_d])
    return {"hidden": hidden, "weight": weight, **strides}, descriptors


def _describable(matrix: Tensor) -> bool:
    """A descriptor wants 16-byte aligned rows, dense within, and at least one."""
    itemsize = matrix.element_size()
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * itemsize % 16 == 0
    return aligned and matrix.stride(1) == 1 and matrix.numel() > 0
