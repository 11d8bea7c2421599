"""pytest-benchmark: a step from hidden states, ours and the peers' (`pytest benchmarks --benchmark-only`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import linear
from benchmarks.peers import Implementation
from benchmarks.workloads import ON_A_CPU, Workload

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

CASES = [
    pytest.param(workload, mode, implementation, id=f"{workload.name}-{mode}-{name}")
    for workload, modes in ON_A_CPU.items()
    for mode in modes
    for name, implementation in linear.applicable(workload, mode).items()
]


@pytest.mark.parametrize(("workload", "mode", "implementation"), CASES)
def test_step(benchmark: BenchmarkFixture, workload: Workload, mode: str, implementation: Implementation) -> None:
    inputs = workload.make(mode)

    def clear_gradients() -> None:
        inputs.hidden.grad = inputs.head.weight.grad = None

    benchmark.group = f"{workload.name}/{mode}"
    benchmark.pedantic(linear.run_step, (implementation.step, inputs), setup=clear_gradients, rounds=5, warmup_rounds=1)
