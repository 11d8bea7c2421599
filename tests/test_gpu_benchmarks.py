"""The GPU benchmarks and the tuner run: every step at a tiny size, on the GPU or in the interpreter."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cwdpo_kernels import ops

pytest.importorskip("triton")
from benchmarks import cost, gpu, gpu_measure, gpu_peers, tune
from cwdpo_kernels.triton import configs

TINY = gpu_measure.Shape("tiny", tokens=40, vocab=300, dim=64)
SMALL = (40, 300, 64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("make", [gpu.linear_steps, gpu.logits_steps])
def test_every_step_runs_and_has_a_cost(make):
    with torch.device(DEVICE), ops.forced(DEVICE, "triton"):
        steps, costs = make(TINY)
        assert steps.keys() == costs.keys()
        for step in steps.values():
            step()


def test_peers_run_and_a_failing_one_is_reported(monkeypatch, tmp_path):
    def broken(*args):
        raise RuntimeError("no kernel\nfor this chip")

    found = gpu_peers.peers.implementations(DEVICE)
    found["broken"] = replace(found["eager, full logits"], logp=broken)
    monkeypatch.setattr(gpu_peers.peers, "implementations", lambda device: found)
    monkeypatch.setattr(
        gpu_peers.gpu_measure, "measure", lambda steps: {op: run_once(step) for op, step in steps.items()}
    )
    report = gpu_measure.Report(tmp_path / "peer.json")
    with torch.device(DEVICE), torch.compiler.set_stance("force_eager"):
        for name in ("eager, full logits", "broken"):
            gpu_peers.measure(report, name, TINY)
    saved = json.loads((tmp_path / "peer.json").read_text())
    assert [row["op"] for row in saved["measurements"]] == [
        "eager, full logits, frozen",
        "eager, full logits, trainable",
    ]
    assert saved["failed"]["tiny, broken, frozen"] == "RuntimeError: no kernel"


def run_once(step):
    step()
    return {"ms": 1.0, "extra_gib": 0.0}


def test_a_peer_that_crashes_its_process_leaves_its_rows_and_a_failure(monkeypatch, tmp_path):
    row = {"shape": "tiny", "op": "crashing, frozen", "ms": 2.0, "extra_gib": 0.5}

    def crash(command, **options):
        path = command[command.index("--out") + 1]
        Path(path).write_text(json.dumps({"measurements": [row], "failed": {}}))
        raise subprocess.CalledProcessError(-11, "benchmarks.gpu_peers")

    crashing = gpu_peers.peers.Implementation("peer", step=run_once)
    monkeypatch.setattr(gpu_peers.peers, "implementations", lambda device: {"crashing": crashing})
    monkeypatch.setattr(gpu_peers.peers, "cannot_run", lambda device: {"absent": "not installed"})
    monkeypatch.setattr(gpu_peers.subprocess, "run", crash)
    report = gpu_measure.Report(tmp_path / "gpu.json")
    report.data["limits"]["tiny"] = {"flops_per_s": 1e9, "bytes_per_s": 1e9}
    gpu_peers.run_all(report, [TINY], tmp_path)
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["measurements"][0]["ms"] == 2.0
    # frozen: two products of 2 N D V operations at 1e9 a second, in 2 ms
    assert saved["measurements"][0]["of_limit"] == pytest.approx(2 * 2 * 40 * 300 * 64 / 1e9 / 2e-3)
    assert saved["failed"]["absent"] == "not installed"
    assert "SIGSEGV" in saved["failed"]["crashing"]
    assert not (tmp_path / "peer.json").exists()


def test_nothing_new_starts_after_the_time_budget(tmp_path):
    report = gpu_measure.Report(tmp_path / "gpu.json", budget_seconds=0)
    report.attempt("late", lambda: pytest.fail("was started"))
    assert json.loads((tmp_path / "gpu.json").read_text())["failed"] == {"late": "skipped: the time budget is spent"}


def test_values_are_checked_before_anything_is_timed(monkeypatch):
    with torch.device(DEVICE), ops.forced(DEVICE, "triton"):
        gpu.check_values(*SMALL)
        monkeypatch.setattr(gpu.ck, "linear_logprob", lambda *args: gpu.reference.linear_logprob(*args) * 1.05)
        with pytest.raises(AssertionError, match="logp: relative error"):
            gpu.check_values(*SMALL)


def test_the_tuner_rejects_a_candidate_with_wrong_results(monkeypatch):
    monkeypatch.setattr(tune, "milliseconds", lambda step: step() is None or 1.0)
    with torch.device(DEVICE):
        arguments = torch.randn(40, 64), torch.randn(300, 64), torch.randint(300, (40,))
        config = configs.tile_config(arguments[0])
        _, logp = tune.milliseconds_of(config, arguments, None)
        tune.milliseconds_of(config, arguments, logp)
        with pytest.raises(AssertionError):
            tune.milliseconds_of(config, arguments, logp + 1)
    assert len(set(tune.candidates(config))) == len(tune.candidates(config))


def test_cost_of_a_7b_model():
    """Worked out by hand: 2 N D V operations per product, with N 8192, V 151936, D 4096."""
    product = 2 * 8192 * 151936 * 4096
    for mode, products in (("no_grad", 1), ("frozen", 2), ("trainable", 4)):
        assert cost.linear_logprob(8192, 4096, 151936, 2, mode).flops == products * product
    assert cost.linear_logprob(8192, 4096, 151936, 2, "trainable", kept_share=1.0).flops == 3 * product
    assert cost.logits_logprob(8192, 151936, 2, backward=True).bytes == 3 * 8192 * 151936 * 2
    with pytest.raises(ValueError, match=re.escape("got 'half'")):
        cost.linear_logprob(1, 1, 1, 2, "half")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_commands_exit_with_an_error(monkeypatch):
    for module in (gpu, tune):
        monkeypatch.setattr("sys.argv", ["benchmark", *(["--out", "unused"] if module is gpu else [])])
        with pytest.raises(SystemExit, match="expected a GPU"):
            module.main()
