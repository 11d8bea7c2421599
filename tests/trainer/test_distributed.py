"""Two gloo processes give the gradients and the trajectory of one, whatever unit of FSDP2 the head is in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cwdpo_kernels.adapters.hugging_face import attach_head

sys.path.insert(0, str(Path(__file__).parent))
import distributed_worker as worker


def launch(*command: str, processes: int = 2, timeout: float = 300) -> None:
    """`command` in `processes` processes that find one another; the output of one that fails is the message."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        started.append(subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True))  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("distributed") / "results.pt"
    launch(worker.__file__, str(out))
    return torch.load(out)


@pytest.fixture(scope="module")
def expected() -> dict:
    """The same training in one process, with both pairs in its batch."""
    found = {}
    for name in worker.MODELS:
        model, inputs, labels = worker.batch(name)
        attach_head(model)
        found[name] = worker.train(model, inputs, labels, worker.REFERENCES)
    return found


LAYOUTS = [(name, "ddp") for name in worker.MODELS] + list(worker.LAYOUTS)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_two_processes_are_one(results, expected, name, layout):
    found, one = results[name, layout], expected[name]
    assert found["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert one["losses"][-1] < 0.7 * one["losses"][0]
    for key in ("grads", "weights"):
        assert found[key].keys() == one[key].keys()
        for parameter, value in one[key].items():
            torch.testing.assert_close(found[key][parameter], value, rtol=1e-3, atol=1e-5, msg=f"{key} {parameter}")
    assert one["grads"]["lm_head.weight" if name == "untied" else "model.language_model.embed_tokens.weight"].any()
