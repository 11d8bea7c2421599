"""What the documents show runs as it stands, and what they point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cwdpo_trainer.config.loader import load_config

ROOT = Path(__file__).parents[1]
README, ADAPTERS, TRAINER = ROOT / "README.md", ROOT / "docs" / "adapters.md", ROOT / "docs" / "trainer.md"


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


def run(document: Path, code: str) -> dict:
    names: dict = {}
    exec(compile(code, str(document), "exec"), names)
    return names


def test_example_of_the_readme():
    (code,) = blocks(README, "python")
    names = run(README, code)
    assert names["out"].loss.item() > 0
    assert torch.isfinite(names["hidden"].grad).all()
    assert names["lm_head"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "code", blocks(ADAPTERS, "python"), ids=lambda code: re.findall(r"(?:compat|integrations)\.(\w+)", code)[0]
)
def test_examples_of_the_adapters(code):
    """Each makes a `loss` whose gradient reaches its head, which is called `weight` or belongs to a `model`."""
    names = run(ADAPTERS, code)
    names["loss"].backward()
    weight = names["weight"] if "weight" in names else names["model"].lm_head.weight
    assert torch.isfinite(weight.grad).all()
    assert weight.grad.abs().sum() > 0


def test_imports_of_the_adapters():
    """What the differences tell to import, instead of what: ours exists under the name of theirs."""
    added = re.findall(r"^\+(from cwdpo_kernels.*)$", "".join(blocks(ADAPTERS, "diff")), re.MULTILINE)
    assert len(added) >= 4
    for line in added:
        run(ADAPTERS, line)


def test_configuration_of_the_trainer(tmp_path):
    (text,) = blocks(TRAINER, "yaml")
    (tmp_path / "mine.yaml").write_text(text)
    config = load_config(tmp_path / "mine.yaml")
    assert (config.lora.r, config.dpo.logp_floor, config.data.over_length) == (16, "auto", "trim")


@pytest.mark.parametrize("document", [README, ADAPTERS, TRAINER], ids=lambda path: path.name)
def test_links(document):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    assert links
    for link in links:
        assert (document.parent / link).exists(), link
