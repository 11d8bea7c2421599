"""The step of benchmarks/sharing.py on a GPU: long prompts, bfloat16, and a few layers as wide as a 3B model's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from benchmarks import gpu_measure, sharing

MODEL = sharing.Shape(0, vocab=151936, dim=2048, layers=4, heads=16, groups=2, dtype="bfloat16")
TOLERANCE = 0.05  # between the gradients of the two ways, of the largest entry: attention rounds in another order


def do(lengths: str, emit: Callable[[dict], None]) -> None:
    """Time a step of one pair in both ways. `lengths`: tokens of the prompt and of each answer, as "8192 : 512".

    Emits a row for each way; `difference` is that of the gradients, relative to the largest entry. Raises SystemExit if
    it is too large.
    """
    prompt, answer = map(int, lengths.split(" : "))
    setup = sharing.Setup(replace(MODEL, prompt=prompt, answer=answer))
    difference = sharing.check_equal(setup, TOLERANCE)
    found = gpu_measure.measure({way: functools.partial(setup.step, way) for way in sharing.WAYS})
    for way, result in found.items():
        emit({"lengths": lengths, "way": way, "difference": difference, **result})
