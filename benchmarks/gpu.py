"""Values, benchmarks and tests on a GPU from the source tree: `python -m benchmarks.gpu --out DIR [--budget-s N]`.

In this order: errors against float64 (`values`), our steps on hidden states (`ours`), the bare GEMMs of each shape and
copy bandwidth (`limits`), our ops on logits (`logits`), statistics, divergences and sparse gradients (`other`), steps
with shared prompts (`sharing`), `peers` and `tests`. Times are medians, measured with CUDA events behind a busy GPU, so
that launches do not count.

DIR/gpu.json is replaced after every row, so a cut at any moment leaves everything that was measured; `--resume` goes on
from there. Without it, an earlier file is renamed to gpu-1.json and so on. This process never touches the GPU. A child
process does, item by item, each with a time limit (benchmarks/gpu_plan.py); every peer has a child of its own. An item
that fails, crashes its process or takes too long is an entry of `failed`, and a new process goes on. Our ops are not
timed if their values are wrong in bfloat16.

DIR/log.txt has what the children print. `--wheels FOLDER` installs a folder of wheels into DIR/peers, for the peers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import gpu_run
from benchmarks.gpu_file import LEFT_OUT
from benchmarks.gpu_plan import PARTS, PEERS, PROMPTS, plan
from benchmarks.models import SHAPES

# Python imports this module when it starts. It reads .pth files in its own folders only, not in those of PYTHONPATH.
READS_PTH_FILES = "import os, site\n\nsite.addsitedir(os.path.dirname(__file__))\n"


def install(run: gpu_run.Run, wheels: Path) -> None:
    """Install each wheel of a folder for the peers, without its dependencies. One that fails is recorded.

    Wheels may share folders, which pip's --target would replace, so each goes to a folder of its own first.
    """
    for wheel in sorted(wheels.glob("*.whl")):
        name, limit = f"install {wheel.name}", min(run.limits["install"], run.seconds_left())
        if run.report.finished(name):
            continue
        if limit < gpu_run.LEAST_SECONDS:
            run.report.fail(name, f"{LEFT_OUT}the time budget is spent")
            continue
        with tempfile.TemporaryDirectory() as target:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--no-index", "--target", target, str(wheel)]
            try:
                result = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            except subprocess.TimeoutExpired:
                run.report.fail(name, f"took longer than {limit:.0f} s")
                continue
            if result.returncode:
                lines = result.stderr.strip().splitlines() or [f"pip ended with status {result.returncode}"]
                run.report.fail(name, next((line for line in lines if line.startswith("ERROR")), lines[-1]))
                continue
            shutil.copytree(target, run.packages, dirs_exist_ok=True)
            (run.packages / "sitecustomize.py").write_text(READS_PTH_FILES)
            run.report.done(name)


def is_missing(module: str | None, packages: Path) -> bool:
    """Whether neither the folder of the wheels nor this Python has a module."""
    return module is not None and importlib.machinery.PathFinder.find_spec(module, [str(packages), *sys.path]) is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu_run.add_options(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shapes", nargs="+", choices=[shape.name for shape in SHAPES], help="default: all")
    parser.add_argument("--peers", nargs="+", choices=PEERS, metavar="PEER", help="default: all")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for the peers")
    options = parser.parse_args()
    if options.wheels and not any(options.wheels.glob("*.whl")):
        parser.error(f"--wheels: expected a folder with wheels (*.whl), got {options.wheels}")
    run, simulated = gpu_run.begin(options, "gpu.json")
    peers = {
        name: module for name, module in simulated.get("PEERS", PEERS).items() if name in (options.peers or [name])
    }
    shapes = [x for x in simulated.get("SHAPES", SHAPES) if x.name in (options.shapes or [x.name])]
    with run.log, contextlib.closing(run):
        if options.wheels and "peers" in options.parts:
            install(run, options.wheels)
        missing = [peer for peer, module in peers.items() if is_missing(module, run.packages)]
        run.unusable |= dict.fromkeys(missing, "not installed")
        for item in plan(shapes, options.parts, peers, simulated.get("PROMPTS", PROMPTS)):
            run.do(item)
    gpu_run.say_the_end(run.report)


if __name__ == "__main__":
    main()
