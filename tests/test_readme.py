"""The code in the documents runs, their config file loads, and their links resolve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import cwdpo_kernels
from cwdpo_trainer.config.loader import KEYS, load_config
from cwdpo_trainer.config.stage_arguments import StageArguments
from cwdpo_trainer.config.training_options import OURS, REFUSED

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
GUIDE, ADAPTERS, TRAINER = DOCS / "guide.md", DOCS / "adapters.md", DOCS / "trainer.md"
TEMPLATE = ROOT / "CARD.md"  # a Jinja template that Hugging Face's kernel-builder fills in
DOCUMENTS = sorted({*ROOT.glob("*.md"), *DOCS.rglob("*.md")} - {TEMPLATE})
LOSS = DOCS / "contributing" / "loss.md"
GENERATED_ANCHORS = {DOCS / "options.md", *(DOCS / "api").glob("*.md")}  # headings from docstrings


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


def run(document: Path, code: str, names: dict | None = None) -> dict:
    names = {} if names is None else names
    exec(compile(code, str(document), "exec"), names)
    return names


def test_example_of_the_readme():
    (code,) = blocks(README, "python")
    names = run(README, code)
    assert names["out"].loss.item() > 0
    assert torch.isfinite(names["hidden"].grad).all()
    assert names["lm_head"].weight.grad.abs().sum() > 0


def test_examples_of_the_guide():
    """They run one after another, as a reader would paste them."""
    names: dict = {}
    for code in blocks(GUIDE, "python"):
        run(GUIDE, code, names)
    assert torch.isfinite(names["lm_head"].weight.grad).all()
    torch.testing.assert_close(names["token_logp"][:, :7], torch.zeros(4, 7))  # the prompt has no labels
    assert names["token_logp"][:, 7:-1].lt(0).all()


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


def test_example_of_a_new_loss():
    names = run(LOSS, blocks(LOSS, "python")[0])
    assert torch.isfinite(names["hidden"].grad).all()
    assert names["weight"].grad.abs().sum() > 0


def test_imports_of_the_adapters():
    """Every import that a diff adds exists."""
    added = re.findall(r"^\+(from cwdpo_kernels.*)$", "".join(blocks(ADAPTERS, "diff")), re.MULTILINE)
    assert len(added) >= 4
    for line in added:
        run(ADAPTERS, line)


def test_config_of_the_trainer(tmp_path):
    (text,) = blocks(TRAINER, "yaml")
    (tmp_path / "mine.yaml").write_text(text)
    config = load_config(tmp_path / "mine.yaml")
    assert (config.lora.r, config.dpo.logp_floor, config.data.over_length) == (16, "auto", "trim")


def test_the_api_page_lists_every_public_name():
    listed = re.findall(r"^::: cwdpo_kernels\.(\w+)$", (DOCS / "api" / "kernels.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(cwdpo_kernels.__all__)


def test_the_options_page_has_every_key_and_section():
    page = (DOCS / "options.md").read_text()
    listed = re.findall(r"^- `(\w+)` \(|options: {heading: (\w+),", page, re.MULTILINE)
    assert sorted(filter(None, sum(listed, ()))) == sorted(KEYS)


def test_the_options_page_names_every_refused_option():
    page = (DOCS / "options.md").read_text()
    assert "StageArguments\n" in page
    listed = StageArguments.__doc__.split("Refused:")[1].split("So are")[0]
    refused = [item.rpartition(": ")[2] for item in listed.split("\n    - ")[1:]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(refused))) == sorted({**OURS, **REFUSED})


def test_every_page_with_python_is_run():
    """A new page with Python blocks needs a test above."""
    with_python = {document for document in DOCUMENTS if blocks(document, "python")}
    assert with_python <= {README, GUIDE, ADAPTERS, LOSS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links(document):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(document)):
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_file(), link
        assert not anchor or target in GENERATED_ANCHORS or anchor in anchors(target), link


def prose(document: Path) -> str:
    return re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
