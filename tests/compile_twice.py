"""Compiles what a step of the tuner launches, in a worker, then again by launching; prints both counts as JSON."""

import json
import os
from collections import Counter
from pathlib import Path

import torch
from triton.runtime.jit import JITFunction

from benchmarks import ahead, compiled, models, tune, tune_work

CONFIG = dict(zip(tune.NAMES, (64, 64, 32, 4, 2, 8, False), strict=True))
SHAPE = models.Shape("small", tokens=64, vocab=128, dim=64)


def in_cache():
    """kernel -> how many times it has been compiled."""
    return Counter(path.stem for path in Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.cubin"))


def compile_only(kernel, *args, **kwargs):
    return run(kernel, *args, **kwargs | {"warmup": True})


if __name__ == "__main__":
    with ahead.without_device(compiled.TARGETS["sm_90"]), torch.device("meta"), tune_work.on_chip("sm_90"):
        ahead.fix_keys()
        rows = list(tune_work.compile_ahead(SHAPE, "bfloat16", [CONFIG]))
        assert [row["problem"] for row in rows] == [""], rows
        ahead_of_time = in_cache()
        run, JITFunction.run = JITFunction.run, compile_only
        with tune_work.configured("bfloat16", CONFIG):
            tune_work.step(*tune_work.inputs(SHAPE, "bfloat16"))
        print(json.dumps([ahead_of_time, in_cache()]))
