"""The GPU benchmarks and the tuner run: every step at a tiny size, on the GPU or in the interpreter."""

import re
from dataclasses import replace

import pytest
import torch

from cwdpo_kernels import ops

pytest.importorskip("triton")
from benchmarks import cost, gpu, tune
from cwdpo_kernels.triton import configs

TINY = gpu.Shape("tiny", tokens=40, vocab=300, dim=64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("make", [gpu.linear_steps, gpu.logits_steps])
def test_every_step_runs_and_has_a_cost(make):
    with torch.device(DEVICE), ops.forced(DEVICE, "triton"):
        steps, costs = make(TINY)
        assert steps.keys() == costs.keys()
        for step in steps.values():
            step()


def test_peers_run_and_a_failing_one_is_reported(monkeypatch):
    def broken(*args):
        raise RuntimeError("no kernel\nfor this chip")

    found = gpu.peers.implementations(DEVICE)
    found["broken"] = replace(found["eager, full logits"], logp=broken)
    monkeypatch.setattr(gpu.peers, "implementations", lambda device: found)
    failed = {}
    with torch.device(DEVICE), torch.compiler.set_stance("force_eager"):
        steps, costs = gpu.peer_steps(TINY, failed)
        assert steps.keys() == costs.keys()
        assert {"eager, full logits, frozen", "eager, full logits, trainable"} <= steps.keys()
        for step in steps.values():
            step()
    assert failed["tiny, broken, frozen"] == "RuntimeError: no kernel"
    assert not any(name.startswith("cwdpo_kernels") for name in steps)


def test_values_are_checked_before_anything_is_timed(monkeypatch):
    with torch.device(DEVICE), ops.forced(DEVICE, "triton"):
        gpu.check_values()
        monkeypatch.setattr(gpu.ck, "linear_logprob", lambda *args: gpu.reference.linear_logprob(*args) * 1.05)
        with pytest.raises(AssertionError, match="logp: relative error"):
            gpu.check_values()


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
