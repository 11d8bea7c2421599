"""A child process of `benchmarks.gpu`, as the parent sees it: requests go in, rows come out, with a time limit.

The child is `python -m benchmarks.gpu_step`. It reads one request a line from standard input and writes messages, one
JSON a line, to a pipe of its own, so that what libraries print does not mix with them:

    {"environment": {...}}                once, after the start
    {"row": kind, "values": {...}}        a result
    {"done": name} or {"failed": name, "reason": text, "fatal": whether the process is of no further use}

It runs in a process group of its own. When its standard input ends, it kills its group: no child outlives the parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]


class Ended(Exception):
    """The process ended, with the reason."""


class TooLong(Exception):
    """No message came in time."""


class Child:
    """A running child. `log` receives what it prints. `path` is a folder of packages that it may import."""

    def __init__(self, arguments: list[str], log: IO[str], path: Path | None = None) -> None:
        reading, writing = os.pipe()
        environment = dict(os.environ)
        if path is not None:
            found = environment.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join([str(path.resolve()), *([found] if found else [])])
        command = [sys.executable, "-m", "benchmarks.gpu_step", "--fd", str(writing), *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True,
            pass_fds=[writing], start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        self.messages: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor) as stream:
            for line in stream:
                try:
                    self.messages.put(json.loads(line))
                except ValueError:
                    break  # the process ended in the middle of a line
        self.messages.put(None)

    def send(self, request: dict) -> None:
        """Raises Ended if the process is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise Ended(self.reason()) from None

    def receive(self, seconds: float) -> Iterator[dict]:
        """The messages of the next `seconds`. Raises Ended or TooLong; the caller stops at the message it waits for."""
        end = time.monotonic() + seconds
        while True:
            ended, left = self.process.poll() is not None, end - time.monotonic()
            try:
                message = self.messages.get(timeout=max(min(left, 1.0), 0.0))
            except queue.Empty:
                if ended:  # the pipe does not, if a process that the child forked has it open
                    raise Ended(self.reason()) from None
                if left <= 1.0:
                    raise TooLong from None
                continue
            if message is None:
                raise Ended(self.reason())
            yield message

    def reason(self) -> str:
        """Why the process ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        code = self.process.returncode
        if code is not None and code < 0:
            return f"the process ended with {signal.Signals(-code).name}"
        return f"the process ended with status {code}"

    def close(self) -> None:
        """Kill the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)  # a process that waits for the device may not be gone at once
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
