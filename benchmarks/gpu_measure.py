"""What the GPU benchmarks share: inputs, and timing by CUDA events behind a busy GPU."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.models import Shape

REPEATS, WARM_UP = 9, 3
WARM_UP_SECONDS, MOST_WARM_UPS = 0.3, 100  # until the clocks of the GPU have settled
BUSY_CYCLES = 20_000_000  # about ten milliseconds, longer than the launches of most steps take
CYCLES_PER_MS, MOST_CYCLES = 2_000_000, 400_000_000  # at 2 GHz, a little above the clock of an H100


def linear_inputs(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [N, D] and weight [V, D], which require gradients, and labels [N], on the default device."""
    hidden = torch.randn(shape.tokens, shape.dim, dtype=dtype, requires_grad=True)
    weight = (torch.randn(shape.vocab, shape.dim, dtype=dtype) * shape.dim**-0.5).requires_grad_()
    return hidden, weight, torch.randint(shape.vocab, (shape.tokens,))


def milliseconds(step: Callable[[], object]) -> float:
    """The time of one call on the GPU, by CUDA events. The GPU is kept busy first, while the step is launched."""
    return both_milliseconds(step)[0]


def both_milliseconds(step: Callable[[], object], busy_cycles: int = BUSY_CYCLES) -> tuple[float, float]:
    """The time of one call on the GPU, and the time that the host takes to launch it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(busy_cycles)
    begin = time.perf_counter()
    start.record()
    step()
    end.record()
    host = time.perf_counter() - begin
    end.synchronize()
    return start.elapsed_time(end), host * 1e3


def warm_up(step: Callable[[], object]) -> int:
    """Call a step until it is compiled and the clocks have settled. Returns for how many cycles to keep the GPU busy.

    That is twice as long as the step takes to launch, within bounds.
    """
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < WARM_UP_SECONDS and calls < MOST_WARM_UPS:
        step()
        torch.cuda.synchronize()
        calls += 1
    _, host = both_milliseconds(step)
    return min(max(BUSY_CYCLES, int(2 * host * CYCLES_PER_MS)), MOST_CYCLES)


def measure(steps: dict[str, Callable]) -> dict[str, dict]:
    """Median times of interleaved repetitions, and the peak of allocated memory above what was allocated before.

    `host_ms` is the time to launch a step. Without other work to hide it, it limits a step that is faster on the GPU.
    """
    with _without_default_device():
        return _measure(steps)


@contextlib.contextmanager
def _without_default_device() -> Iterator[None]:
    """Programs rarely set a default device, which makes every call of torch slower to launch."""
    device = torch.get_default_device()
    torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_device(device)


def _measure(steps: dict[str, Callable]) -> dict[str, dict]:
    busy = {name: warm_up(step) for name, step in steps.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            times[name].append(both_milliseconds(step, busy[name]))
    results = {}
    for name, step in steps.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**30
        all_ms, host_ms = zip(*times[name], strict=True)
        results[name] = {
            "ms": statistics.median(all_ms), "all_ms": all_ms, "host_ms": statistics.median(host_ms),
            "extra_gib": extra,
        }  # fmt: skip
    return results
