"""What the compiled kernels of benchmarks/results/triton_compiled.json are held to.

`failures` lists the requirements that a row misses, and `worse` the measures in which a report is behind an earlier
one. `python -m benchmarks.compiled` and the tests use both. Neither Triton nor a GPU is needed.
"""

from __future__ import annotations

from collections.abc import Iterable

SHARED_LIMIT = {  # bytes a program
    "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10,
    "sm_120": 99 << 10, "sm_121": 99 << 10, "gfx90a": 64 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10,
}  # fmt: skip
# The matrix instruction of each chip.
TENSOR_CORE = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120", "sm_121"), "mma.sync"),
    "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", **dict.fromkeys(("gfx90a", "gfx942", "gfx950"), "v_mfma"),
}  # fmt: skip
WITHOUT_TF32 = ("gfx90a", "gfx950")  # float32 products there are "ieee", whatever is asked for
TMA = "cp.async.bulk.tensor"
POINTER_KERNELS = ("_block_sparse_kernel", "_block_sparse_transposed_kernel")  # load through pointers, not TMA
TILE_KERNELS = ("_sweep_kernel", "_gradient_kernel", "_divergence_kernel")  # compute tiles of logits
GEMM_KERNELS = (*TILE_KERNELS, *POINTER_KERNELS)
STRICT_CHIPS = ("sm_90", "sm_100")  # GEMM kernels must not spill and must load through TMA
ITEMSIZE = {"half": 2, "tf32": 4, "ieee": 4}
# How many instructions of a tile may come before its first TMA load: address computations, labels and barriers. Until
# then the tensor cores wait.
MOST_BEFORE_TMA = 400
# A regenerated report may be worse in these measures only for a reason that it states.
RATCHET = ("spill_bytes", "instructions_per_element", "before_matrix", "before_tma")
SPEED = ("DESCRIPTORS", "FLATTEN")  # flags that change no result


def failures(row: dict) -> list[str]:
    """The requirements that a compiled kernel misses."""
    chip, constants, half = row["chip"], row["constants"], row["precision"] == "half"
    problems = []
    if row["shared_bytes"] > SHARED_LIMIT[chip]:
        problems.append(f"{row['shared_bytes']} bytes of shared memory, the limit is {SHARED_LIMIT[chip]}")
    if row["kernel"] in GEMM_KERNELS and not constants.get("KEPT"):
        if chip in STRICT_CHIPS and row["spill_bytes"]:
            problems.append(f"a stack frame of {row['spill_bytes']} bytes a thread")
        if half and not row["matrix_instructions"]:
            problems.append(f"no {TENSOR_CORE[chip]}")
        if half and chip in STRICT_CHIPS and row["kernel"] not in POINTER_KERNELS:
            if not row["tma_instructions"]:
                problems.append(f"no {TMA}")
            elif row["before_tma"] is None or row["before_tma"] > MOST_BEFORE_TMA:
                problems.append(f"{row['before_tma']} instructions before the first {TMA}, at most {MOST_BEFORE_TMA}")
        if chip == "sm_90" and row["precision"] != "ieee" and row["kernel"] in TILE_KERNELS and row["waits"] != [1]:
            problems.append(f"the main loop waits until {row['waits']} groups of wgmma run, not [1]")
    if "wide_stores" in row and writes_tile(row) and row["wide_stores"] < (wanted := _tile_bytes(row) // 16):
        problems.append(f"{row['wide_stores']} stores of 16 bytes, {wanted} would write the tile")
    return [f"{name_of(row)}: {problem}" for problem in problems]


def writes_tile(row: dict) -> bool:
    return row["kernel"] == "_gradient_kernel" or bool(row["constants"].get("WRITE_TILE"))


def elements(row: dict) -> int:
    """The entries of a tile that a thread computes."""
    return row["constants"]["BLOCK_N"] * row["constants"]["BLOCK_V"] // (32 * row["num_warps"])


def _tile_bytes(row: dict) -> int:
    """The bytes of a tile that a thread writes."""
    return elements(row) * ITEMSIZE[row["precision"]]


def name_of(row: dict) -> str:
    """What a kernel computes: chip, precision, hidden size, kernel, and the flags that are set."""
    flags = [name for name, value in row["constants"].items() if value is True and name not in SPEED]
    return " ".join([row["chip"], row["precision"], f"D {row['dim']}", row["kernel"], *flags])


def worse(before: Iterable[dict], after: Iterable[dict]) -> list[str]:
    """Where a kernel's largest measure has grown, as "kernel: measure, before -> after"."""
    earlier, later = _measures(before), _measures(after)
    return [
        f"{name}: {measure} {earlier[name, measure]} -> {value}"
        for (name, measure), value in later.items()
        if value > earlier.get((name, measure), value)
    ]


def _measures(rows: Iterable[dict]) -> dict[tuple[str, str], float]:
    """name_of and measure -> the largest value, where kernels of bfloat16 and float16 have the same name."""
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        for measure in RATCHET:
            if row.get(measure) is not None:
                key = name_of(row), measure
                found[key] = max(found.get(key, 0), row[measure])
    return found
