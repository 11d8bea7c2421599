"""`pytest benchmarks --benchmark-only`: a step from hidden states, ours and the peers'."""

import pytest

from benchmarks import linear
from benchmarks.workloads import ON_A_CPU

CASES = [
    pytest.param(workload, mode, implementation, id=f"{workload.name}-{mode}-{name}")
    for workload, modes in ON_A_CPU.items()
    for mode in modes
    for name, implementation in linear.applicable(workload, mode).items()
]


@pytest.mark.parametrize(("workload", "mode", "implementation"), CASES)
def test_step(benchmark, workload, mode, implementation):
    inputs = workload.make(mode)

    def forget_gradients() -> None:
        inputs.hidden.grad = inputs.head.weight.grad = None

    benchmark.group = f"{workload.name}/{mode}"
    benchmark.pedantic(
        linear.run_step, (implementation.step, inputs), setup=forget_gradients, rounds=5, warmup_rounds=1
    )
