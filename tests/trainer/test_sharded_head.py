"""Two gloo processes give the gradients and the trajectory of one, whichever FSDP2 unit holds the head."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from cwdpo_kernels.integrations.hugging_face import attach_head

sys.path.insert(0, str(Path(__file__).parent))
import layout_worker as worker


@pytest.fixture(scope="module")
def results(forks, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("layouts")
    forks.run_connected(worker.__file__, str(folder / "results.pt"), folder=folder)
    return torch.load(folder / "results.pt")


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
