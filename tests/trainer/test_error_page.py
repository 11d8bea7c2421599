"""docs/errors.md shows the errors that a user can meet, as the code raises them. To write it after a change:

python -m pytest tests/trainer/test_error_page.py --write-errors
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import cwdpo_kernels as ck
from cwdpo_kernels.compat import liger, torch_nn
from cwdpo_kernels.integrations.hugging_face import attach_head
from cwdpo_trainer.cli import main
from cwdpo_trainer.data.rows import load_rows

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
HEAD = """# Errors

An error says where it is, what was expected, what came and, if it is not plain from that, what to do. The functions
raise `ValueError` for a wrong argument and `NotImplementedError` for what they do not support. The trainer's commands
print one line and exit with status 2; `cwdpo check` prints all mistakes at once. This page is written by a test, from
the errors that the code raises.
"""

FORM = r"\w: (.*expected .+, got .+|.* not (implemented|supported|defined))"
Call = Callable[[], object]
HIDDEN, WEIGHT, LABELS = torch.zeros(4, 6, 8), torch.zeros(11, 8), torch.zeros(4, 6, dtype=torch.long)
REFERENCE, COOLING = torch.zeros(2), ck.Cooling()


def cwdpo(**options: Any) -> object:
    given: dict[str, Any] = {"ref_chosen": REFERENCE, "ref_rejected": REFERENCE, "beta": 0.1, "cooling": COOLING}
    return ck.linear_cwdpo_loss(HIDDEN, WEIGHT, LABELS, **(given | options))


def second_derivative() -> None:
    hidden = torch.randn(3, 8, requires_grad=True)
    logp = ck.linear_logprob(hidden, WEIGHT, torch.zeros(3, dtype=torch.long))
    (grad,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    grad.sum().backward()


KERNELS: dict[str, Call] = {
    "A head for another hidden size": lambda: ck.linear_logprob(HIDDEN, torch.zeros(11, 7), LABELS),
    "A head in another dtype": lambda: ck.linear_logprob(HIDDEN, WEIGHT.double(), LABELS),
    "A head on another device": lambda: ck.linear_logprob(HIDDEN, WEIGHT.to("meta"), LABELS),
    "Labels outside the vocabulary": lambda: ck.linear_logprob(HIDDEN, WEIGHT, LABELS + 11),
    "Labels that are not integers": lambda: ck.linear_logprob(HIDDEN, WEIGHT, LABELS.float()),
    "Labels of another shape": lambda: ck.linear_logprob(HIDDEN, WEIGHT, LABELS[:3]),
    "A soft cap that cannot be computed": lambda: ck.linear_logprob(HIDDEN, ck.Head(WEIGHT, softcap=-1.0), LABELS),
    "Something else than a head": lambda: ck.linear_logprob(HIDDEN, "lm_head", LABELS),  # type: ignore[arg-type]
    "A packed batch without cu_seqlens": lambda: ck.sequence_logprob(torch.zeros(24), LABELS.flatten()),
    "cu_seqlens that do not cover the tokens": lambda: ck.sequence_logprob(
        torch.zeros(24), LABELS.flatten(), torch.tensor([0, 30])
    ),
    "An odd number of sequences": lambda: ck.linear_cwdpo_loss(
        HIDDEN[:3], WEIGHT, LABELS[:3], REFERENCE, REFERENCE, beta=0.1, cooling=COOLING
    ),
    "Reference log-probs for another number of pairs": lambda: cwdpo(ref_chosen=torch.zeros(3)),
    "A beta of 0": lambda: cwdpo(beta=0.0),
    "A temperature of 0": lambda: ck.Cooling(temperature=0.0),
    "A mode that does not exist": lambda: ck.GentleNegatives(mode="mild"),
    "A budget of 0 bytes": lambda: ck.MemoryBudget(workspace_bytes=0),
    "A second derivative": second_derivative,
}

ADAPTERS: dict[str, Call] = {
    "A model without a linear head": lambda: attach_head(torch.nn.ReLU()),  # type: ignore[arg-type]
    "Class weights in torch's linear_cross_entropy": lambda: torch_nn.linear_cross_entropy(
        HIDDEN.flatten(0, 1), WEIGHT, LABELS.flatten(), weight=torch.ones(11)
    ),
    "A Liger loss that does not exist": lambda: liger.LigerFusedLinearDPOLoss(loss_type="sigmoidal"),
}

CONFIGS = {
    "A key that does not exist": "dpo.bta=0.1",
    "A value of another type": "dpo.beta=high",
    "A value out of range": "dpo.tau=0",
    "An option that the trainer sets itself": "dpo.do_train=true",
    "An option of the top level in a section": "sft.output_dir=x",
    "Options that do not fit together": "dpo.cooling=constant",
    "Quantization without LoRA": "model.quantization=4bit",
    "A schedule that goes backward": "dpo.onpolicy_fraction=[[0.5, 0], [0.2, 1]]",
    "A preset that does not exist": "preset=no_filter",
    "A folder that cannot be written": "output_dir=train.jsonl/runs",
    "A server without http": "sampling.server=host:8000",
    "An override that is not one": "dpo.beta",
    "A finding that does not exist": "dpo.stop_on=[squeeze]",
}

GOOD = {"prompt": "<image> describe", "chosen": "a red square", "rejected": "a blue square", "images": ["one.png"]}
ROWS: dict[str, dict[str, Any] | str] = {
    "A line that is not JSON": '{"prompt": ',
    "A missing column": {key: value for key, value in GOOD.items() if key != "chosen"},
    "A column of another type": {**GOOD, "chosen": 5},
    "An empty answer": {**GOOD, "chosen": " "},
    "Alike answers": {**GOOD, "rejected": GOOD["chosen"]},
    "An image that does not exist": {**GOOD, "images": ["two.png"]},
}


def test_the_page_is_up_to_date(task, settings, tmp_path, monkeypatch, request, capsys):
    for part in ("model", "images"):
        shutil.copytree(task / part, tmp_path / part)
    for name in ("train.jsonl", "heldout.jsonl"):
        shutil.copy(task / name, tmp_path)
    shutil.copy(task / "images" / "train0.png", tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    settings |= {"output_dir": "runs/mine", "model": {"path": "model"}}
    settings["data"] = {"train": "train.jsonl", "heldout": "heldout.jsonl"}
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    sections = {
        "Functions": {title: raised(call) for title, call in KERNELS.items()},
        "Adapters": {title: raised(call) for title, call in ADAPTERS.items()},
        "Config files": {title: printed(capsys, "run", "mine.yaml", value) for title, value in CONFIGS.items()},
        "Datasets": {title: of_row(row) for title, row in ROWS.items()},
        "Models and run folders": folders(settings, capsys),
    }
    page = HEAD
    for section, messages in sections.items():
        page += f"\n## {section}\n"
        for title, text in messages.items():
            message = text.replace(f"{tmp_path}/", "")
            assert re.search(r"\w: (.*expected .+, got .+|.* not (implemented|supported|defined))", message, re.S), (
                message
            )
            page += f"\n{title}:\n\n```text\n{message}\n```\n"
    if request.config.getoption("--write-errors", default=False):
        PAGE.write_text(page)
    assert page == PAGE.read_text(), "write the page again, see the docstring of this file"


def raised(call: Call) -> str:
    """The message of the error that `call` raises."""
    with pytest.raises((ValueError, NotImplementedError)) as error:
        call()
    return str(error.value)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that exits with status 2 prints to stderr."""
    capsys.readouterr()
    assert main(arguments) == 2
    return re.sub(r"[0-9a-f]{12}\.\.\.", "012345678901...", capsys.readouterr().err.strip())  # checksums of weights


def of_row(row: dict[str, Any] | str) -> str:
    text = row if isinstance(row, str) else json.dumps(row)
    Path("pairs.jsonl").write_text(f"{json.dumps(GOOD)}\n{text}\n")
    return raised(lambda: [one.load_images() for one in load_rows(Path("pairs.jsonl"))])


def folders(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Errors about models, folders of other runs, and runs that diverge."""

    def run(*overrides: str) -> str:
        return printed(capsys, "run", "mine.yaml", *overrides)

    found = {"A model that does not exist": run("model.path=./missing")}
    Path("runs/notes").mkdir(parents=True)
    Path("runs/notes/todo.txt").write_text("buy milk")
    found["A folder with other files"] = run("output_dir=runs/notes")
    found["A learning rate that diverges"] = run("sft.learning_rate=1e36", "output_dir=runs/diverged")
    assert main(["sft", "mine.yaml", "sft.max_steps=2", "sft.save_steps=2"]) == 0
    found["Another config in the same folder"] = run("sft.max_steps=3", "sft.save_steps=2")
    weights = Path("runs/mine/sft/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    found["A saved model that has changed"] = run("sft.max_steps=2", "sft.save_steps=2")
    Path("runs/mine/run.json").write_text("{")
    found["A damaged file of the run folder"] = run("sft.max_steps=2", "sft.save_steps=2")
    return found
