"""The README's example runs as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_example_runs_as_pasted():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["out"].loss.item() > 0
    assert torch.isfinite(names["hidden"].grad).all()
    assert names["lm_head"].weight.grad.abs().sum() > 0
