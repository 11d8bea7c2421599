"""Searches configurations of the sweep and gradient kernels: `python -m benchmarks.tune --out DIR [--budget-s N]`.

Every candidate is compiled first, in parallel, and dropped if it does not compile or spills registers. The others are
timed in random order, in a child process with a time limit each: the sweep kernel alone and the gradient kernel alone,
after a comparison of log-probs and gradients with those of the current row. DIR/tune.json is replaced after every row;
`--resume` goes on from there. At the end the best rows for each chip, dtype and D are printed, for configs.py.

`--compile-for sm_90` compiles the candidates for a chip that need not be here, and stops. With its DIR/tune.json, and
Triton's cache of that machine, `--resume` on the GPU starts with the timings.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
from collections.abc import Sequence

from benchmarks import gpu_run
from benchmarks.gpu_file import Report
from benchmarks.gpu_plan import Item
from benchmarks.models import SHAPES, Shape

BLOCKS = [(128, 256, 64), (128, 128, 64), (256, 128, 64), (64, 256, 64), (128, 256, 32)]
KERNELS = ("_sweep_kernel", "_gradient_kernel")
NAMES = ("block_n", "block_v", "block_d", "num_warps", "num_stages", "group_n", "persistent")


def candidates() -> list[dict]:
    """All combinations of tile shape, warps, pipeline stages, tile order, and persistent or not."""
    product = itertools.product(BLOCKS, (4, 8), (2, 3, 4), (8, 16, 32), (False, True))
    return [dict(zip(NAMES, (*block, *others), strict=True)) for block, *others in product]


def text(candidate: dict) -> str:
    """A candidate as arguments of TileConfig."""
    return ", ".join(f"{name}={candidate[name]}" for name in NAMES)


def items(report: Report, shape: Shape, dtype: str, found: Sequence[dict]) -> list[Item]:
    """Compile the candidates that are not compiled yet, then time all of them in random order."""
    compiled = {x["config"] for x in report.data.get("candidates", []) if (x["dim"], x["dtype"]) == (shape.dim, dtype)}
    todo = [candidate for candidate in found if text(candidate) not in compiled]
    name, request = f"D {shape.dim}, {dtype}", {"dtype": dtype}
    first = Item(f"{name}, compiled ahead", "tune", "tune compile", json.dumps({**request, "configs": todo}), (shape,))
    order = list(found)
    random.Random(0).shuffle(order)  # the same order after --resume
    timings = [
        Item(f"{name}, {text(config)}", "tune", "tune", json.dumps({**request, "config": config}), (shape,))
        for config in order
    ]
    return [*([first] if todo else []), *timings]


def problem_of(report: Report, item: Item) -> str:
    """Why a candidate is not timed, or ""."""
    if item.kind != "tune":
        return ""
    request, dim = json.loads(item.op), item.shapes[0].dim
    key = (dim, request["dtype"], text(request["config"]))
    rows = report.data.get("candidates", [])
    return next((x["problem"] for x in rows if (x["dim"], x["dtype"], x["config"]) == key), "")


def winners(data: dict) -> list[str]:
    """The fastest candidates for each dtype and D: for either kernel, and for both together."""
    times: dict[tuple, dict[str, dict[str, float]]] = {}
    for row in data.get("tuned", []):
        key = (row["chip"], row["precision"], row["dtype"], row["dim"], row["descriptors"])
        times.setdefault(key, {}).setdefault(row["config"], {})[row["kernel"]] = row["ms"]
    lines = []
    for (chip, precision, dtype, dim, descriptors), by_config in sorted(times.items()):
        both = {config: ms for config, ms in by_config.items() if set(ms) == set(KERNELS)}
        choices = {kernel: {config: ms[kernel] for config, ms in both.items()} for kernel in KERNELS}
        choices["both"] = {config: sum(ms.values()) for config, ms in both.items()}
        for kernel, ms in choices.items():
            if ms:
                best = min(ms, key=ms.__getitem__)
                source = f"timed on {data['environment']['device']}, {dtype}, D {dim}"
                row = f'TileConfig({best}, descriptors={descriptors}, source="{source}"),'
                row = f'("{chip}", "{precision}", {dim}): {row}'
                lines.append(f"{kernel:20}{ms[best]:9.3f} ms  {row}")
    return lines


def compile_for(chip: str, run: gpu_run.Run, shape: Shape, dtype: str, found: list[dict]) -> None:
    """Compile the candidates without a device."""
    import torch
    import triton

    from benchmarks import ahead, compiled, compiled_checks, tune_work

    version = triton.__version__
    ahead.fix_keys()
    with ahead.without_device(compiled.TARGETS[chip]), torch.device("meta"), tune_work.on_chip(chip):
        for row in tune_work.compile_ahead(shape, dtype, found, compiled_checks.SHARED_LIMIT[chip]):
            run.report.add("candidates", {**row, "chip": chip, "triton": version})
            if run.seconds_left() <= 0:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu_run.add_options(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in SHAPES], help="default: all")
    parser.add_argument("--compile-for", metavar="CHIP", help="compile the candidates for this chip and stop")
    options = parser.parse_args()
    run, simulated = gpu_run.begin(options, "tune.json")
    found = simulated.get("CANDIDATES", candidates())
    shapes = [x for x in simulated.get("SHAPES", SHAPES) if x.name in (options.shapes or [x.name])]
    with run.log, contextlib.closing(run):
        for shape in shapes:
            if options.compile_for:
                compile_for(options.compile_for, run, shape, options.dtype, found)
                continue
            for item in items(run.report, shape, options.dtype, found):
                if problem := problem_of(run.report, item):
                    run.report.fail(item.name, problem)
                else:
                    run.do(item)
    gpu_run.say_the_end(run.report)
    print("\n".join(winners(run.report.data)))


if __name__ == "__main__":
    main()
