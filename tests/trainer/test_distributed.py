"""Two gloo processes give the gradients and the trajectory of one, whichever FSDP2 unit holds the head. So do complete
runs, with and without LoRA, that are interrupted and resumed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cwdpo_kernels.integrations.hugging_face import attach_head
from cwdpo_trainer.cli import main

sys.path.insert(0, str(Path(__file__).parent))
import layout_worker as worker
import run_worker


def launch(*command: str, processes: int = 2, timeout: float = 300) -> None:
    """Run `command` in `processes` connected processes. If one fails, the assertion shows the output of all."""
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
    # The first failure makes the others fail too, so show all outputs.
    assert [process.returncode for process in started] == [0] * processes, "\n".join(out[-3000:] for out in outputs)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("distributed") / "results.pt"
    launch(worker.__file__, str(out))
    return torch.load(out)


@pytest.fixture(scope="module")
def expected() -> dict:
    """The same training in one process, with both pairs in one batch."""
    found = {}
    for name in worker.MODELS:
        model, inputs, labels = worker.batch(name)
        attach_head(model)
        found[name] = worker.train(model, inputs, labels, worker.REFERENCES)
    return found


LAYOUTS = [(name, "ddp") for name in worker.MODELS] + list(worker.LAYOUTS)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_two_processes_equal_one(results, expected, name, layout):
    found, one = results[name, layout], expected[name]
    assert found["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert one["losses"][-1] < 0.7 * one["losses"][0]
    for key in ("grads", "weights"):
        assert found[key].keys() == one[key].keys()
        for parameter, value in one[key].items():
            torch.testing.assert_close(found[key][parameter], value, rtol=1e-3, atol=1e-5, msg=f"{key} {parameter}")
    assert one["grads"]["lm_head.weight" if name == "untied" else "model.language_model.embed_tokens.weight"].any()


def logged(folder: Path) -> dict[str, list[float]]:
    """All metrics that both stages logged, from training and probes, except timings."""
    metrics: dict[str, list[float]] = {}
    for stage in ("sft", "cwdpo"):
        history = json.loads((folder / stage / "trainer_state.json").read_text())["log_history"]
        for entry in history:
            for name, value in entry.items():
                if isinstance(value, float) and not name.startswith("train_"):
                    metrics.setdefault(f"{stage}/{name}", []).append(value)
    return metrics


@pytest.mark.parametrize(("kind", "lora"), [("ddp", True), ("fsdp", False)])
def test_a_run_of_two_processes_equals_a_run_of_one(settings, write_config, tmp_path, kind, lora):
    if lora:
        settings["lora"] = {"r": 4, "target_modules": ["q_proj", "v_proj", "lm_head"]}
    settings["sft"]["nll_floor"] = 6.5  # between the means of the batches
    settings["dpo"].update(onpolicy_fraction=0.0, drop_below=-4.2)
    for stage in ("sft", "dpo"):
        settings[stage].update(max_steps=10, eval_steps=5, logging_steps=1, use_cpu=True)
    one = tmp_path / "one"
    assert main(["run", str(write_config({**settings, "output_dir": str(one)}))]) == 0
    for stage in ("sft", "dpo"):
        settings[stage]["per_device_train_batch_size"] //= 2
    config = str(write_config(settings))
    launch(run_worker.__file__, kind, config, "7")
    launch(run_worker.__file__, kind, config)
    expected, found = logged(one), logged(Path(settings["output_dir"]))
    assert found.keys() == expected.keys()
    assert max(expected["sft/penalty"]) > 0
    assert min(expected["cwdpo/kept"]) < 1
    for metrics in (expected, found):
        del metrics["cwdpo/accuracy"][0]  # margins are 0 up to rounding
    for name, values in expected.items():
        # Rounding can move a token across the edge of a bin of the calibration error.
        tolerance = {"rel": 2e-3, "abs": 2e-2 if "ece" in name else 1e-4}
        assert found[name] == pytest.approx(values, **tolerance), name


def test_processes_of_a_sharded_model_sample_together(settings, write_config):
    """At a step, processes need different numbers of answers, or none, but all must take part in each forward."""
    del settings["sft"]
    settings["dpo"].update(
        max_steps=8, eval_steps=8, use_cpu=True, per_device_train_batch_size=1, onpolicy_fraction=0.5,
        onpolicy_staleness=0.0, logp_floor="auto", tau="auto",
    )  # fmt: skip
    launch(run_worker.__file__, "fsdp", str(write_config(settings)))
    needed = []
    for rank in range(2):
        path = Path(settings["output_dir"]) / "checkpoints" / "dpo" / f"negatives_{rank}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(8))
        needed.append([line["origin"] == "onpolicy" for line in lines])
    assert any(needed[0])
    assert any(needed[1])
    assert needed[0] != needed[1]
