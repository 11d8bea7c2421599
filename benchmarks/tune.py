"""Times launch configurations of the sweep and gradient kernels on this GPU and prints the best row for configs.py.

`python -m benchmarks.tune [--dtype bfloat16] [--tokens N --vocab V --dim D]`. Candidates that do not compile, need too
much shared memory or give a wrong result are listed and skipped.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from dataclasses import replace
from unittest import mock

import torch
import triton

from benchmarks.gpu_measure import milliseconds
from cwdpo_kernels import IGNORE_INDEX
from cwdpo_kernels.triton import configs, linear_logprob

BLOCKS = [(128, 256, 64), (128, 128, 64), (256, 128, 64), (64, 256, 64), (128, 256, 32)]
REPEATS = 5


def candidates(base: configs.TileConfig) -> list[configs.TileConfig]:
    """All combinations of tile shape, warps, pipeline stages, tile order, and persistent or not."""
    return [
        replace(base, block_n=n, block_v=v, block_d=d, num_warps=warps, num_stages=stages, group_n=group, persistent=p)
        for (n, v, d), warps, stages, group, p in itertools.product(
            BLOCKS, (4, 8), (2, 3, 4), (8, 16, 32), (False, True)
        )
    ]


def milliseconds_of(
    config: configs.TileConfig, arguments: tuple, expected: torch.Tensor | None
) -> tuple[float, torch.Tensor]:
    """The median time of a forward without kept tiles plus a backward, and its log-probs. Raises if they are wrong."""
    hidden, weight, labels = arguments
    key = (configs.chip(hidden.device), "half" if hidden.itemsize == 2 else configs.precision())
    with mock.patch.dict(configs.TILES, {key: config}):
        head = (hidden, weight, None, labels, 1.0, None, IGNORE_INDEX)

        def step() -> torch.Tensor:
            logp, anchor, sum_exp, _, kept = linear_logprob.linear_logprob(*head, False, False, 0, 0)
            grad = torch.ones_like(logp)
            linear_logprob.linear_logprob_backward(
                grad, *head[:4], logp, anchor, sum_exp, kept, *head[4:], True, True, False, False, 0
            )
            return logp

        logp = step()
        if expected is not None:
            torch.testing.assert_close(logp, expected, rtol=1e-4, atol=1e-4)
        return statistics.median(milliseconds(step) for _ in range(REPEATS)), logp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dim", type=int, default=4096)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.tune: expected a GPU, got torch.cuda.is_available() == False")
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.dim, device="cuda", dtype=dtype)
    weight = torch.randn(options.vocab, options.dim, device="cuda", dtype=dtype) * options.dim**-0.5
    labels = torch.randint(options.vocab, (options.tokens,), device="cuda")
    arguments = hidden, weight, labels

    base = configs.tile_config(hidden)
    best, expected = milliseconds_of(base, arguments, None)
    print(f"{best:9.2f} ms  {base}  (current row)", flush=True)
    winner = base
    for config in candidates(base):
        try:  # a failing candidate is reported and skipped
            time, _ = milliseconds_of(config, arguments, expected)
        except (triton.errors.TritonError, RuntimeError, AssertionError) as error:
            print(f"      skipped  {config}: {str(error).splitlines()[0]}", flush=True)
            continue
        if time < best:
            best, winner = time, config
            print(f"{time:9.2f} ms  {config}", flush=True)
    source = (
        f"tuned: {torch.cuda.get_device_name()}, {options.dtype}, {options.tokens} x {options.vocab} x {options.dim}"
    )
    print(f"best, {best:.2f} ms: {replace(winner, source=source)}")


if __name__ == "__main__":
    main()
