"""Runs `cwdpo` commands, each in a forked process, so that the imports are paid once: `python survival_worker.py`.

Reads a command per line from stdin, as a JSON list: the file for stderr, then the arguments of `cwdpo`. Prints the id
of the process, and its exit status once it has ended (-9 if it was killed). After "sh" comes another program's command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback

import torch

import cwdpo_trainer.run  # noqa: F401  what `cwdpo run` imports
from cwdpo_trainer import cli


def main() -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        errors, *arguments = json.loads(line)
        process = os.fork()
        if process == 0:
            os._exit(_child(errors, arguments))
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def _child(errors: str, arguments: list[str]) -> int:
    with open(errors, "w") as file, open(os.devnull, "w") as null:
        os.dup2(file.fileno(), 2)
        os.dup2(null.fileno(), 1)
        try:
            return subprocess.call(arguments[1]) if arguments[0] == "sh" else cli.main(arguments)
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stderr.flush()


if __name__ == "__main__":
    main()
