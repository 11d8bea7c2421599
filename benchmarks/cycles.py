"""How long a step takes on an H100, from what its kernels compile to.

In cycles, a tile takes

    2 BLOCK_N BLOCK_V D / FLOPS                product, at the full rate of the tensor cores, or
    bytes of its operands / LOADED             if that is longer, and, one after another:
    START                                      to start a program, unless programs are persistent
    LATENCY + BEFORE before_matrix             until its first matrix instruction; the latency only if the loop of the
                                               tile before has not loaded ahead
    AFTER (tile_instructions - before_matrix)  per warp of a scheduler, for the rest
    bytes of the tile / STORED                 where it is written; without a product, which hides them, its reads and
                                               writes at MEMORY bytes

with the counts of benchmarks/results/triton_compiled.json (see sass.py). Alone, a program computes its product for a
share of that time. As many programs run on a multiprocessor as its registers and shared memory have room for, mostly
one, and independently of each other: with P programs no product is computed for (1 - share)^P of the time.

Products by vendor libraries run at VENDOR of the full rate, other operations at the rate of the memory. START, LATENCY
and BEFORE are estimates. AFTER, STORED, VENDOR and LOADED were fitted to benchmarks/results/h100_tiles.json
(docs/notes.md, "On an H100").

The clock is the one at which the three products of a step take a given time, so it contains the limits of power and
cooling. predict.py records the launches of steps and writes their work to benchmarks/results/predicted.json. Nothing
here imports torch or Triton.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks import compiled_checks, results
from benchmarks.models import SHAPES, Shape

FILE = results.FOLDER / "predicted.json"
MULTIPROCESSORS, SCHEDULERS, FLOPS, BYTES_PER_SECOND = 132, 4, 4096, 3.03e12  # FLOPS: a cycle and multiprocessor
START, LATENCY, BEFORE, AFTER, STORED, MEMORY, VENDOR = 700, 800, 4.0, 1.34, 37, 15, 0.955
LOADED = 48  # a cycle and multiprocessor, from the L2 cache: as many as tiles of 128 x 256 in half precision need
REGISTERS, RESERVED = 65536, 1024  # of a multiprocessor; bytes of shared memory that every program takes
LAUNCH_SECONDS = 3e-6
PUBLISHED_MS = 42.0  # the three products of SHAPES[0] on an H100, TRL issue 7244
BOOST = 1.755e9  # the highest clock


def clock(product_ms: float, shape: Shape) -> float:
    """Cycles a second, if the three products of a step take `product_ms` milliseconds."""
    flops = 6.0 * shape.tokens * shape.vocab * shape.dim
    return flops / (product_ms * 1e-3) / (MULTIPROCESSORS * FLOPS * VENDOR)


def programs(row: dict) -> int:
    """How many programs of a compiled kernel run on a multiprocessor."""
    by_registers = REGISTERS // (row["registers"] * 32 * row["num_warps"])
    by_memory = (compiled_checks.SHARED_LIMIT[row["chip"]] + RESERVED) // (row["shared_bytes"] + RESERVED)
    return max(min(by_registers, by_memory), 1)


def tile_cycles(row: dict, dim: int) -> float:
    """Cycles of a multiprocessor for a tile of a compiled kernel, product included; `row`: of the report."""
    constants, warps = row["constants"], row["num_warps"] / SCHEDULERS
    entries = constants["BLOCK_N"] * constants["BLOCK_V"]
    itemsize = compiled_checks.ITEMSIZE[row["precision"]]
    written = entries * itemsize if compiled_checks.writes_tile(row) else 0
    start = 0.0 if constants["FLATTEN"] else START
    if row["before_matrix"] is None:  # no product
        return start + AFTER * warps * row["tile_instructions"] + 2 * written / MEMORY
    before = BEFORE * row["before_matrix"] + (LATENCY if row["before_tma"] < row["before_matrix"] else 0)
    after = AFTER * warps * (row["tile_instructions"] - row["before_matrix"])
    arrival = (constants["BLOCK_N"] + constants["BLOCK_V"]) * dim * itemsize / LOADED
    product = max(2 * entries * dim / FLOPS, arrival)
    share = product / (start + before + product + after + written / STORED)
    return product / (1 - (1 - share) ** programs(row))


def ceiling(row: dict, dim: int, cycles_per_second: float) -> float:
    """The floating-point operations a second that a kernel reaches at most."""
    tile = row["constants"]["BLOCK_N"] * row["constants"]["BLOCK_V"]
    return MULTIPROCESSORS * cycles_per_second * 2 * tile * dim / tile_cycles(row, dim)


@dataclass
class Step:
    """The work of a step: cycles of our kernels, operations of vendor products, bytes of the rest, launches."""

    cycles: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    launches: int = 0

    def seconds(self, cycles_per_second: float) -> float:
        vendor = self.flops / (MULTIPROCESSORS * FLOPS * VENDOR * cycles_per_second)
        kernels = self.cycles / cycles_per_second
        return kernels + vendor + self.bytes / BYTES_PER_SECOND + self.launches * LAUNCH_SECONDS


def predicted_ms(product_ms: float, shape: Shape = SHAPES[0], file: Path = FILE) -> dict[tuple[str, str], float]:
    """Milliseconds by the names of a shape and a step, if the three products of `shape` take `product_ms`.

    `file`: the work of the steps.
    """
    steps = json.loads(file.read_text())["steps"]
    rate = clock(product_ms, shape)
    return {(row["shape"], row["op"]): Step(**row["work"]).seconds(rate) * 1e3 for row in steps}
