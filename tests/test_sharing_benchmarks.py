"""The benchmarks of shared prompts run at a tiny size and refuse to report steps that differ."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl")
from benchmarks import sharing, trl_step

SHAPES = {"text": sharing.Shape(24, answer=8, vocab=300, dim=32, layers=1, heads=4, groups=2)}
SHAPES["image"] = replace(SHAPES["text"], patches=3)
pytestmark = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def a_mebibyte(*_):
    """Stands in for a worker that measures memory."""
    return 1 << 20


def test_shared_prompts(shape, monkeypatch):
    measured = sharing.measure(replace(shape, rejected=2), 2, a_mebibyte)
    assert measured["shared_to_separate"]["extra_mib"] == 1
    json.dumps(measured)
    plain = sharing.Setup.shared_logp

    def wrong(self):
        return [logp._replace(total=2 * logp.total) for logp in plain(self)]

    monkeypatch.setattr(sharing.Setup, "shared_logp", wrong)
    with pytest.raises(SystemExit, match=r"gradients differ by .*, nothing is reported"):
        sharing.measure(shape, 2, a_mebibyte)


def test_trl(shape, monkeypatch):
    measured = trl_step.measure(shape, 1, a_mebibyte)
    assert measured["to_trl"].keys() == {trl_step.SEPARATE, trl_step.SHARED}
    json.dumps(measured)

    def wrong(*args, **options):
        options["args"].beta = 9.0
        return trl_step.WAYS[trl_step.SEPARATE](*args, **options)

    monkeypatch.setitem(trl_step.WAYS, trl_step.SHARED, wrong)
    with pytest.raises(SystemExit, match="losses differ, nothing is reported"):
        trl_step.measure(shape, 1, a_mebibyte)
