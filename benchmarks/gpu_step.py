"""The child process of `benchmarks.gpu`: does the items that it is sent, one by one (see benchmarks/gpu_child.py)."""

from __future__ import annotations

import argparse
import json
import os
import queue
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import IO

import torch

from benchmarks import gpu_work, peers


def read_requests(stream: IO[str]) -> queue.Queue[dict]:
    """The requests, as a queue. When the stream ends, the parent is gone: kill this process and all it started."""
    requests: queue.Queue[dict] = queue.Queue()

    def read() -> None:
        for line in stream:
            requests.put(json.loads(line))
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    return requests


def environment(commit: str, simulated: Path | None) -> dict:
    """Device and versions. A simulation is named as one, even on a machine with a GPU."""
    versions = peers.versions()
    if simulated is not None:
        device, capability = f"simulated by {simulated.name}, no GPU", [0, 0]
    else:
        device, capability = torch.cuda.get_device_name(), list(torch.cuda.get_device_capability())
    return {
        "device": device, "capability": capability, "simulated": simulated is not None, "torch": torch.__version__,
        "triton": versions.get("triton", "none"), "python": sys.version.split()[0], "commit": commit,
        "versions": versions,
    }  # fmt: skip


def do(request: dict, out: Path, descriptor: int, emit: gpu_work.Emit) -> dict:
    """The message about an item: done, or failed with the reason. After an error of the device, no item can succeed."""
    name = request["name"]
    try:
        gpu_work.do(request, out, descriptor, emit)
        gpu_work.synchronize()
    except (Exception, SystemExit) as error:  # benchmarks refuse wrong results with SystemExit
        return {"failed": name, "reason": gpu_work.first_line(error), "fatal": not gpu_work.device_works()}
    return {"done": name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="where the messages go")
    parser.add_argument("--process", required=True, help="whose items these are, for the list of processes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--simulate", type=Path)
    options = parser.parse_args()
    requests = read_requests(sys.stdin)
    with os.fdopen(options.fd, "w", buffering=1) as messages:

        def send(message: dict) -> None:
            messages.write(json.dumps(message) + "\n")

        def emit(kind: str, values: dict) -> None:
            send({"row": kind, "values": values})

        if options.simulate:
            runpy.run_path(str(options.simulate))["install"]()
        elif not torch.cuda.is_available():
            send({"error": "expected a GPU, got torch.cuda.is_available() == False"})
            return
        else:
            from benchmarks import ahead  # needs Triton

            ahead.fix_keys()
        torch.set_default_device(gpu_work.DEVICE)
        found = environment(options.commit, options.simulate)
        send({"environment": found, "cannot_run": peers.missing_in_torch()})
        while True:
            message = do(requests.get(), options.out, options.fd, emit)
            send(message)
            if message.get("fatal"):
                return


if __name__ == "__main__":
    main()
