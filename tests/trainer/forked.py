"""Runs Python programs in forked processes, so that torch and transformers are imported once for all of them.

`python forked.py` is the process that forks. Each line of its stdin is a request in JSON, answered with a number:
["start", {"command": ..., "env": ..., "stdout": ..., "stderr": ...}] with the id of the new process, ["wait", id] with
that process's exit status (-9 if it was killed).
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path


class Forks:
    """Starts programs in processes that have imported what `cwdpo run` needs. Leave it as a context to end it."""

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        """`prefix`: a command that starts the forking process, such as `unshare`."""
        self._server = subprocess.Popen(
            [*prefix, sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._number()

    def start(self, *command: str, stdout: Path, stderr: Path, env: dict[str, str] | None = None) -> int:
        """Start `python *command` in a process of its own: a file or "-c" and code, and arguments. Returns its id."""
        request = {"command": command, "env": env or {}, "stdout": str(stdout), "stderr": str(stderr)}
        return self._ask("start", request)

    def wait(self, process: int, timeout: float = 300) -> int:
        """The exit status of a process that `start` returned, -9 if it was killed, as it is after `timeout` seconds."""
        kill = threading.Timer(timeout, os.kill, (process, signal.SIGKILL))
        kill.start()
        try:
            return self._ask("wait", process)
        finally:
            kill.cancel()

    def run_connected(self, *command: str, folder: Path, processes: int = 2) -> None:
        """Run `command` in connected processes. If one fails, the assertion shows the output of all, from `folder`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        outputs = [folder / f"rank{rank}.txt" for rank in range(processes)]
        started = []
        for rank, output in enumerate(outputs):
            env = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
            started.append(self.start(*command, stdout=output, stderr=output, env=env))
        statuses = [self.wait(process) for process in started]
        # The first failure makes the others fail too, so show all outputs.
        assert statuses == [0] * processes, "\n".join(output.read_text()[-3000:] for output in outputs)

    def _ask(self, *request: object) -> int:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._number()

    def _number(self) -> int:
        return int(self._server.stdout.readline())

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()


def main() -> None:
    import torch

    import cwdpo_trainer.run  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    print(0, file=answers, flush=True)
    for line in sys.stdin:
        kind, value = json.loads(line)
        if kind == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(value, 0)[1])
        elif (answer := os.fork()) == 0:
            answers.close()
            os._exit(_run(**value))
        print(answer, file=answers, flush=True)


def _run(command: list[str], env: dict[str, str], stdout: str, stderr: str) -> int:
    """Run a program in this process. Returns the exit status."""
    os.environ.update(env)
    for number, path in ((0, os.devnull), (1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    status = 0
    try:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(compile(command[1], "<program>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    main()
