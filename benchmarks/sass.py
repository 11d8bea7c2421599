"""What a tile costs in the machine code (SASS) of a CUDA kernel, counted without a GPU.

A kernel computes tiles. For each it runs a main loop of matrix instructions, and code before and after that loop. The
counts are of the cheapest way through the code for one thread: it skips branches that few tiles take, such as the one
that reads the labels' logits, and takes no turn in a loop that waits. `counts` describes each of them.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = ("HGMMA", "UTCHMMA", "HMMA")  # sm_90, sm_100, others
TMA_LOAD, TMA_STORE, STORE, WIDE_STORE = "UTMALDG", "UTMASTG", "STG", "STG.E.128"
WAIT = "WARPGROUP.DEPBAR.LE"  # until at most N groups of matrix instructions run
LINE = re.compile(
    r"(?P<label>\.L_\w+):|/\*[0-9a-f]+\*/\s+(?P<guard>@\S+\s+)?(?P<code>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)


@dataclass(frozen=True)
class Instruction:
    guarded: bool  # runs only if a predicate holds
    code: str
    operands: str

    @property
    def target(self) -> str | None:
        """The label that it branches to. On sm_80 some branches are calls."""
        found = re.search(r"`\((\.L_\w+)\)", self.operands) if self.code.startswith(("BRA", "CALL")) else None
        return found[1] if found else None

    @property
    def ends(self) -> bool:
        """The next instruction runs only by a branch to it."""
        always = self.code == "EXIT" or (self.code == "BRA" and self.operands.startswith("`"))
        return always and not self.guarded


@dataclass
class Block:
    """Instructions that run one after another, and the indices of the blocks that may follow."""

    instructions: list[Instruction]
    following: list[int]

    def has(self, *codes: str) -> bool:
        return any(instruction.code.startswith(codes) for instruction in self.instructions)


def tool(name: str, cubin: bytes, *options: str) -> str:
    """What one of the tools in Triton's wheel prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(TOOLS / name), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassembled(cubin: bytes) -> str:
    return tool("nvdisasm", cubin, "--print-code", "--no-dataflow")


def control_flow(text: str) -> list[Block]:
    """The basic blocks of a disassembled kernel; the first one is its entry."""
    blocks, labels = [Block([], [])], {}
    for found in LINE.finditer(text):
        last = blocks[-1].instructions[-1:]
        if found["label"] or (last and (last[0].ends or last[0].target)):
            if blocks[-1].instructions:
                blocks.append(Block([], []))
            if found["label"]:
                labels[found["label"]] = len(blocks) - 1
                continue
        if found["code"] != "NOP":
            instruction = Instruction(bool(found["guard"]), found["code"], found["operands"].strip())
            blocks[-1].instructions.append(instruction)
    for index, block in enumerate(blocks):
        last = block.instructions[-1:]
        if index + 1 < len(blocks) and not (last and last[0].ends):
            block.following.append(index + 1)
        if last and (target := last[0].target):
            block.following.append(labels[target])
    return blocks


def cheapest(blocks: list[Block], start: int, wanted: Callable[[int], bool]) -> list[int] | None:
    """The blocks with the fewest instructions after block `start`, up to the first wanted one; None without a way."""
    queue: list[tuple[int, tuple[int, ...]]] = [(0, (start,))]
    seen: set[int] = set()
    while queue:
        cost, path = heapq.heappop(queue)
        if len(path) > 1 and wanted(path[-1]):
            return list(path[1:])
        if len(path) > 1 and path[-1] in seen:
            continue
        seen.update(path[1:][-1:])
        for following in blocks[path[-1]].following:
            heapq.heappush(queue, (cost + len(blocks[following].instructions), (*path, following)))
    return None


def counts(text: str, persistent: bool) -> dict:
    """Counts of a disassembled kernel.

    `persistent`: whether a program loops over tiles; then the code of a tile is a turn of that loop. The result:

    step_instructions       of a turn of the main loop
    tile_instructions       of a tile, with one turn of the main loop taken off; that is what a tile costs beside it
    before_matrix           of a tile, before its first matrix instruction
    before_tma              of a tile, before its first load through TMA
    waits                   how many groups of matrix instructions still run after each wait of the main loop
    wide_stores             of 16 bytes each, of a tile; TMA stores count as those
    special_functions       of a tile: exponentials, for example
    """
    blocks = control_flow(text)
    loops = [path for index, block in enumerate(blocks) if block.has(*MATRIX)
             if (path := cheapest(blocks, index, index.__eq__))]  # fmt: skip
    step = min(loops, key=lambda path: len(_instructions(blocks, path)), default=[])
    path = _tile(blocks, step[-1:], persistent)
    instructions = _instructions(blocks, path)
    turn = _instructions(blocks, step)
    return {
        "step_instructions": len(turn), "tile_instructions": len(instructions) - len(turn),
        "before_matrix": _before(instructions, MATRIX), "before_tma": _before(instructions, (TMA_LOAD,)),
        "waits": [int(x.operands.split(",")[1], 16) for x in turn if x.code == WAIT],
        "wide_stores": sum(x.code == WIDE_STORE or x.code.startswith(TMA_STORE) for x in instructions),
        "special_functions": sum(x.code.startswith("MUFU") for x in instructions),
    }  # fmt: skip


def _tile(blocks: list[Block], main_loop: list[int], persistent: bool) -> list[int]:
    """The blocks of a tile: through the main loop's block, if there is one, to the last store."""
    stores = [index for index, block in enumerate(blocks) if block.has(STORE, TMA_STORE)]
    stops = [*main_loop, *stores[-1:]]
    path = [] if persistent else [0]
    here = stops[-1] if persistent else 0
    for stop in stops:
        if stop != here or persistent:
            path += cheapest(blocks, here, stop.__eq__) or _no_way(here, stop)
        here = stop
    if not persistent and not blocks[here].has("EXIT"):
        path += cheapest(blocks, here, lambda index: blocks[index].has("EXIT")) or _no_way(here, "EXIT")
    return path


def _no_way(start: int, stop: int | str) -> list[int]:
    raise ValueError(f"sass: expected block {start} to lead to {stop}, got no way through the code")


def _instructions(blocks: list[Block], path: Iterable[int]) -> list[Instruction]:
    return [instruction for index in path for instruction in blocks[index].instructions]


def _before(instructions: list[Instruction], codes: tuple[str, ...]) -> int | None:
    places = (place for place, instruction in enumerate(instructions) if instruction.code.startswith(codes))
    return next(places, None)
