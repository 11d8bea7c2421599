"""Works through items in child processes, each with a time limit, within a time budget. Imports no torch."""

from __future__ import annotations

import argparse
import math
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import IO

from benchmarks.gpu_child import ROOT, Child, Ended, TooLong
from benchmarks.gpu_file import LEFT_OUT, Report, open_report
from benchmarks.gpu_plan import CHECKED, LIMITS, OURS, Item

LEAST_SECONDS = 5  # an item is not started with less time left
MOST_LOSSES = {OURS: 8}  # how often a process may crash or hang before the rest of its items are given up
MOST_LOSSES_OF_A_PEER = 2


class Run:
    """The report, the child process at work, and the time that is left.

    arguments: of the children. packages: a folder of packages for the peers. unusable: process -> why none of its items
    can be done.
    """

    def __init__(
        self, report: Report, seconds: float, log: IO[str], arguments: list[str], packages: Path, limits: dict
    ) -> None:
        self.report, self.end, self.log, self.arguments = report, time.monotonic() + seconds, log, arguments
        self.packages, self.limits = packages, limits
        self.child: Child | None = None
        self.process = ""
        self.unusable: dict[str, str] = {}
        self.losses: Counter[str] = Counter()

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def do(self, item: Item) -> None:
        """Do an item, unless it is finished or there is a reason not to. Its failure is recorded, never raised."""
        if self.report.finished(item.name):
            return
        if reason := self.obstacle(item):
            self.report.fail(item.name, reason)
            return
        try:
            self.request(item)
        except Ended as ended:
            self.lose(item, str(ended))
        except TooLong:
            self.lose(item, f"took longer than its limit, {self.limits[item.kind]} s")

    def obstacle(self, item: Item) -> str | None:
        """The reason not to start an item, or None."""
        if self.seconds_left() < LEAST_SECONDS:
            return f"{LEFT_OUT}the time budget is spent"
        if item.process in self.unusable:
            return self.unusable[item.process]
        failed = self.report.data["failed"]
        wrong = [name for case in CHECKED if (name := f"values, {case}") in failed]
        return f"not timed: {wrong[0]}: {failed[wrong[0]]}" if item.timed and wrong else None

    def request(self, item: Item) -> None:
        """Send an item to the child of its process and record what comes back."""
        if self.child is None or self.process != item.process:
            self.close()
            self.start(item.process, self.packages if item.part == "peers" else None)
        assert self.child is not None
        if item.op == "run":
            self.report.forget_tests()
        self.child.send(item.request())
        for message in self.child.receive(min(self.limits[item.kind], self.seconds_left())):
            if "row" in message:
                self.report.add(message["row"], message["values"])
            elif message.get("done") == item.name:
                self.report.done(item.name)
                return
            elif message.get("failed") == item.name:
                if message["fatal"]:
                    self.lose(item, message["reason"])
                else:
                    self.report.fail(item.name, message["reason"])
                return

    def start(self, process: str, packages: Path | None) -> None:
        """Start a child. Raises Ended or TooLong; then no item of its process is tried again."""
        self.process, self.child = process, Child(["--process", process, *self.arguments], self.log, packages)
        try:
            message = next(self.child.receive(min(self.limits["start"], self.seconds_left())))
        except (Ended, TooLong) as error:
            reason = str(error) or f"it took longer than {self.limits['start']} s"
            if self.seconds_left() > 0:
                self.unusable[process] = f"its process did not start: {reason}"
            raise
        if "error" in message:
            raise SystemExit(message["error"])
        self.report.set_environment(message["environment"])
        self.unusable = message["cannot_run"] | self.unusable

    def lose(self, item: Item, reason: str) -> None:
        """Record that the process of an item is gone, and stop trying if that happens too often."""
        self.close()
        if self.seconds_left() <= 0:
            self.report.fail(item.name, f"{LEFT_OUT}the time budget ended meanwhile")
            return
        self.report.fail(item.name, self.unusable.get(item.process, reason))
        self.losses[item.process] += 1
        if self.losses[item.process] >= MOST_LOSSES.get(item.process, MOST_LOSSES_OF_A_PEER):
            self.unusable.setdefault(item.process, f"given up: {reason}")

    def close(self) -> None:
        if self.child is not None:
            self.child.close()
            self.child = None


def positive(text: str) -> float:
    """A number of seconds as an option."""
    if not float(text) > 0:  # nor NaN
        raise argparse.ArgumentTypeError(f"expected a number of seconds > 0, got {text}")
    return float(text)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every program that works through items."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget-s", type=positive, default=math.inf, help="end after this many seconds")
    parser.add_argument("--commit", default="", help="the commit, where the source tree has no git")
    parser.add_argument("--resume", action="store_true", help="keep what the result file has and do the rest")
    parser.add_argument("--simulate", type=Path, help="a file that stands in for the GPU, for tests of this program")


def begin(options: argparse.Namespace, name: str) -> tuple[Run, dict]:
    """A run with the file `name` in the output folder, and the names that the `--simulate` file defines."""
    for number in (signal.SIGTERM, signal.SIGINT):  # so that the child is closed
        signal.signal(number, lambda *_: sys.exit("ended by a signal; go on with --resume"))
    simulated = runpy.run_path(str(options.simulate)) if options.simulate else {}
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        log = (options.out / "log.txt").open("a")
    except OSError as error:
        raise SystemExit(f"--out: expected a folder to write into, got {options.out} ({error.strerror})") from None
    report = open_report(options.out / name, options.resume)
    arguments = ["--out", str(options.out.resolve()), "--commit", options.commit or current_commit()]
    arguments += ["--simulate", str(options.simulate.resolve())] if options.simulate else []
    limits = LIMITS | simulated.get("LIMITS", {})
    packages = options.out / "peers" / "site-packages"  # QuACK refuses to run from a folder of another name
    return Run(report, options.budget_s, log, arguments, packages, limits), simulated


def current_commit() -> str:
    """The commit of the source tree, or "" without git."""
    if not shutil.which("git"):
        return ""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def say_the_end(report: Report) -> None:
    """Print the device, the file and what was left out."""
    left_out, done = report.left_out(), len(report.data["done"])
    print(f"{report.data['environment'].get('device', 'no device')}; {report.path}: {done} items finished")
    if left_out:
        print(f"{len(left_out)} left out, go on with --resume: {', '.join(left_out)}")
