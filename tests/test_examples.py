"""Each example in docs/examples runs as a script: its loss falls, and rejected answers cool."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# TRL 1.16 and Lightning 2.6 still use names that transformers and torch have renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),  # true of the reference
]


@pytest.fixture
def run(load_example, capsys):
    torch.set_num_threads(1)  # tiny models

    def run(name: str) -> tuple[dict, dict[str, tuple[float, float]]]:
        """The script's variables, and the first and last value of each metric that it printed."""
        names = load_example(name, run_name="__main__")
        printed = re.findall(r"^(.+?) +(-?\d+\.\d+) -> +(-?\d+\.\d+)", capsys.readouterr().out, re.MULTILINE)
        return names, {what: (float(first), float(last)) for what, first, last in printed}

    return run


def expect_cooled_learning(printed: dict[str, tuple[float, float]], margin: str, weight: str) -> None:
    first, last = printed["loss"]
    assert first == pytest.approx(0.6931, abs=1e-3)  # the policy is its reference
    assert last < 0.5
    assert printed[margin][1] > printed[margin][0] + 0.5
    assert 0 < printed[weight][1] < 0.7 * printed[weight][0] < 1


def test_plain_pytorch(run):
    names, printed = run("plain_pytorch")
    expect_cooled_learning(printed, "reward margin", "cooling weight")
    assert names["model"].lm_head.weight.grad.abs().sum() > 0
    assert printed["rejected, nats"][1] < names["cooling"].logp_floor


def test_hf_trainer(run):
    names, printed = run("hf_trainer")
    expect_cooled_learning(printed, "reward margin", "cooling weight")
    assert len(names["history"]) == names["args"].max_steps
    assert all(output.kept.all() for output in names["history"])


def test_lightning_module(run):
    names, printed = run("lightning_module")
    expect_cooled_learning(printed, "margin", "cooling_weight")
    module = names["module"]
    assert not torch.equal(module.model.lm_head.weight, module.reference.lm_head.weight)
    assert module.reference.lm_head.weight.grad is None


def test_trl_head(run):
    names, printed = run("trl_head")
    first, last = printed["loss"]
    assert first == pytest.approx(1, abs=1e-3)  # hinge: the policy is its reference
    assert last < 0.8
    assert printed["rewards/margins"][1] > 0.2
    assert names["trainer"].model.forward.__func__.__module__ == "transformers.models.llava.modeling_llava"
    assert "cwdpo_kernels" in names["trainer"].model.forward.__func__.__code__.co_filename


def test_trl_dpo(run):
    names, printed = run("trl_dpo")
    expect_cooled_learning(printed, "rewards/margins", "cooling_weight")
    assert len(names["steps"]) == 12
    assert printed["mean_logps/chosen"][1] > printed["mean_logps/chosen"][0]
    assert names["trainer"].ref_model is not None
