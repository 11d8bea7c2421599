"""`pytest benchmarks --benchmark-only`: a step from hidden states, ours and the peers'."""

import pytest

from benchmarks import linear, peers
from benchmarks.workloads import MODES, ON_A_CPU


@pytest.mark.parametrize("name", peers.implementations())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", ON_A_CPU, ids=lambda workload: workload.name)
def test_step(benchmark, workload, mode, name):
    implementation = linear.applicable(workload, mode).get(name)
    if implementation is None:
        pytest.skip("not for this workload")
    inputs = workload.make(mode)

    def forget_gradients() -> None:
        inputs.hidden.grad = inputs.head.weight.grad = None

    benchmark.group = f"{workload.name}/{mode}"
    benchmark.pedantic(
        linear.run_step, (implementation.step, inputs), setup=forget_gradients, rounds=5, warmup_rounds=1
    )
