"""Stands in for a GPU in `python -m benchmarks.gpu --simulate tests/simulated_gpu.py`: a CPU, tiny sizes, two peers.

The parent reads the names in capitals. The child calls `install`, so nothing here imports torch before that.
"""

import os
import signal
import sys
import time
from types import SimpleNamespace

from benchmarks.models import Shape

SHAPES = [Shape("tiny", tokens=40, vocab=300, dim=64)]
PROMPTS = ["24 : 8"]
CANDIDATES = [
    {"block_n": 32, "block_v": v, "block_d": 64, "num_warps": 4, "num_stages": 1, "group_n": 2, "persistent": False}
    for v in (64, 128)
]  # of benchmarks.tune, which needs TRITON_INTERPRET=1
PEERS = {"crashing": None, "eager, full logits": None, "absent": "no_such_module"}


def install():
    import torch

    from benchmarks import gpu_measure, gpu_tests, gpu_work, peers

    torch.set_num_threads(1)
    gpu_work.DEVICE, gpu_work.VALUE_SIZE, gpu_work.COPIED_BYTES = "cpu", (40, 300, 64), 1 << 16
    if "sharing" in sys.argv:  # the name of the process; transformers takes seconds to import
        from benchmarks import gpu_sharing, sharing

        gpu_sharing.MODEL = sharing.Shape(0, vocab=300, dim=32, layers=1, heads=4, groups=2)

    def measure(steps):
        results = {}
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            ms = (time.perf_counter() - begin) * 1e3
            results[name] = {"ms": ms, "all_ms": [ms], "host_ms": ms, "extra_gib": 0.0}
        return results

    def crash(*args):
        os.kill(os.getpid(), signal.SIGSEGV)

    gpu_measure.measure = measure
    gpu_measure.milliseconds = lambda step: measure({"": step})[""]["ms"]
    gpu_tests.do = lambda op, out, descriptor: {op: "simulated"}
    eager = peers.eager_logp
    logp = {"eager, full logits": eager, "crashing": crash}
    peers.implementations = lambda device: {name: SimpleNamespace(logp=function) for name, function in logp.items()}
    peers.cannot_run = lambda device: {}
