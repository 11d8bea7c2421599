"""Runs the CPU benchmarks and writes one result file per suite, after every measurement.

`python -m benchmarks.run [--only SUITE[/NAME] ...] [--resume] [--repeats N] [--results FOLDER] [--list]`

`--only` measures the names that start with one of the given prefixes and replaces them in their files. `--resume` skips
what this commit has already measured. Without either, all files are overwritten. Run nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    accuracy,
    entropy,
    linear,
    loaded,
    logits,
    memory,
    results,
    scaling,
    sharing,
    sweeps,
    trainer_step,
    trl_head,
    trl_step,
)
from benchmarks.results import ResultFile

# Suite -> module. Its measurements() maps a name to a function (repeats, call) -> results, where `call` runs a function
# in a worker process (memory.worker).
SUITES = {
    "linear": linear,
    "loaded": loaded,
    "scaling": scaling,
    "entropy": entropy,
    "logits": logits,
    "accuracy": accuracy,
    "trainer": trainer_step,
    "sharing": sharing,
    "trl": trl_step,
    "trl_head": trl_head,
    "sweeps": sweeps,
}
REPEATS = 7


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="SUITE[/NAME]")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--results", type=Path, default=results.FOLDER)
    parser.add_argument("--list", action="store_true", help="list the names and exit")
    options = parser.parse_args(arguments)

    todo = selected(options.only)
    if not todo:
        parser.error(f"--only: expected the prefix of a name (see --list), got {' '.join(options.only)}")
    if options.list:
        print("\n".join(f"{suite}/{name}" for suite, name, _ in todo))
        return
    run(todo, options.results, options.repeats, options.resume or options.only != [""], options.resume)


def selected(only: list[str]) -> list[tuple[str, str, Callable]]:
    """(suite, name, measurement) of every measurement whose "suite/name" starts with one of `only`."""
    return [
        (suite, name, measure)
        for suite, module in SUITES.items()
        for name, measure in module.measurements().items()
        if f"{suite}/{name}".startswith(tuple(only))
    ]


def run(todo: list[tuple[str, str, Callable]], folder: Path, repeats: int, keep: bool, skip_done: bool) -> None:
    """Measure `todo`. `keep` keeps the other measurements of the files; `skip_done` skips what this commit measured."""
    results.check_build()
    environment, commit, start = results.environment(), results.commit(), time.monotonic()
    files = {
        suite: ResultFile(results.path_of(suite, folder), environment, keep)
        for suite in dict.fromkeys(suite for suite, *_ in todo)
    }
    with memory.worker() as call:
        for index, (suite, name, measure) in enumerate(todo, 1):
            label = f"[{index:2}/{len(todo)}] {suite}/{name}"
            if skip_done and files[suite].has(name, commit):
                print(f"{label:48} already measured", flush=True)
                continue
            began = time.monotonic()
            print(f"{label:48}", end=" ", flush=True)
            files[suite].put(name, commit, measure(repeats, call))
            now = time.monotonic()
            print(f"{now - began:6.1f} s   {now - start:6.0f} s in total", flush=True)


if __name__ == "__main__":
    main()
