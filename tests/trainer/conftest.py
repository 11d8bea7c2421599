"""Fixtures: a random LLaVA with one layer, its processor, and a small preference dataset."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from cwdpo_kernels import Cooling
from cwdpo_trainer.cli import main
from cwdpo_trainer.config.arguments import ProbeArguments, SamplingArguments
from cwdpo_trainer.config.stage_arguments import DPOArguments, SFTArguments
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.rows import Row, load_rows
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.stages.dpo import CWDPOTrainer
from cwdpo_trainer.stages.sft import ConstrainedSFTTrainer

sys.path.insert(0, str(Path(__file__).parent))
from check_case import Case
from forked import Forks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-trajectory", action="store_true", help="overwrite the trajectory that test_trajectory.py compares with"
    )
    parser.addoption("--write-errors", action="store_true", help="write docs/errors.md again")


@pytest.fixture
def fails_after_a_minute() -> Iterator[None]:
    """For hostile inputs that take a second, and without the limit under test hours."""

    def stop(*_: object) -> None:
        pytest.fail("this took more than a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


WORDS = ["describe", "red", "green", "blue", "left", "right", "above", "below", "and", "a", "the", "square"]
PROMPT = "<image> describe"
STAGE_OPTIONS = {"max_steps": 4, "per_device_train_batch_size": 4, "eval_steps": 2, "logging_steps": 2,
                 "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
SAMPLING = SamplingArguments(max_new_tokens=5)


def save_tiny_llava(folder: Path) -> None:
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocab = {word: index for index, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"height": 8, "width": 8}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, resample=0)
    processor = LlavaProcessor(
        image_processor, tokenizer, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>",
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8,
            patch_size=4, projection_dim=16,
        ),
        text_config=LlamaConfig(
            vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        ),
        image_token_index=vocab["<image>"], vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # make predictions differ between tokens, as in a trained model
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_rows(path: Path, count: int) -> None:
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        color = WORDS[1 + index % 3]
        image = Image.new("RGB", (8, 8), color=[(200, 30, 30), (30, 200, 30), (30, 30, 200)][index % 3])
        image.putpixel((index % 8, index // 8 % 8), (255, 255, 255))
        image.save(path.parent / "images" / f"{path.stem}{index}.png")
        line = {
            "prompt": PROMPT,
            "chosen": f"a {color} square",
            "rejected": f"a {WORDS[1 + (index + 1) % 3]} square" if index % 2 else "and and left below above",
            "images": [f"images/{path.stem}{index}.png"],
            "references": [f"a {color} square", f"the {color} square"],
            "negative_source": "near" if index % 2 else "easy",
        }
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The models are too small for threads, and runs that are compared bit by bit need the same number of them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_plot(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs save an empty plot, because drawing takes longer than training. The marker `plot` asks for the real one."""
    if request.node.get_closest_marker("plot") is None:
        monkeypatch.setattr("cwdpo_trainer.evaluation.report.draw_dynamics", lambda path, histories: path.touch())


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, train.jsonl, heldout.jsonl, heldout_many.jsonl (enough for the doctor) and images/.

    Tests must not modify it.
    """
    folder = tmp_path_factory.mktemp("task")
    save_tiny_llava(folder / "model")
    write_rows(folder / "train.jsonl", 32)
    write_rows(folder / "heldout.jsonl", 12)
    write_rows(folder / "heldout_many.jsonl", 40)
    return folder


@pytest.fixture
def case(tmp_path: Path, task: Path, settings: dict, write_config: Callable[[dict], Path]) -> Case:
    """A valid run in a folder of its own, for `cwdpo check`."""
    return Case(tmp_path, task, settings, write_config)


@pytest.fixture(scope="session")
def collator(task: Path) -> PairCollator:
    return PairCollator(LlavaProcessor.from_pretrained(task / "model"))


@pytest.fixture(scope="session")
def rows(task: Path) -> list[Row]:
    return load_rows(task / "train.jsonl")


@pytest.fixture
def chat_rows(rows: list[Row]) -> list[Row]:
    """The first three rows, with prompts as chat messages."""
    content = [{"type": "image"}, {"type": "text", "text": "describe"}]
    return [dataclasses.replace(row, prompt=[{"role": "user", "content": content}]) for row in rows[:3]]


@pytest.fixture
def model(task: Path) -> LlavaForConditionalGeneration:
    """A fresh copy of the tiny model."""
    return AutoModelForImageTextToText.from_pretrained(task / "model")


@pytest.fixture
def make_stage(model, collator, rows, tmp_path):
    """Makes a trainer of the tiny model. The reference is a copy, changed by `tamper` if given."""

    def make(kind, tamper=None, prefix_sharing="auto", **options):
        reference = copy.deepcopy(model)
        if tamper is not None:
            tamper(reference)
        probes = Probes(rows, collator, ProbeArguments(rows=6), SAMPLING, Cooling(), seed=0)
        arguments = SFTArguments if kind is ConstrainedSFTTrainer else DPOArguments
        args = arguments(**{"output_dir": str(tmp_path / "stage"), **STAGE_OPTIONS, **options})
        more = {"sampling": SAMPLING} if kind is CWDPOTrainer else {}
        return kind(model, reference, args, rows, collator, probes, prefix_sharing=prefix_sharing, **more)

    return make


@pytest.fixture
def settings(task: Path, tmp_path: Path) -> dict:
    """The config of a short run of both stages, for `write_config`."""
    stage = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "eval_steps": 3,
             "logging_steps": 2, "save_steps": 2, "disable_tqdm": True}  # fmt: skip
    return {
        "output_dir": str(tmp_path / "run"),
        "seed": 1,
        "model": {"path": str(task / "model")},
        "data": {"train": str(task / "train.jsonl"), "heldout": str(task / "heldout.jsonl")},
        "sft": {**stage},
        "dpo": {**stage, "onpolicy_fraction": 0.5, "refresh_steps": 2},
        "probes": {"rows": 12, "batch_size": 8, "caption_rows": 12},
        "sampling": {"max_new_tokens": 6},
    }


@pytest.fixture
def write_config(tmp_path: Path):
    """A function that writes settings to a YAML file and returns its path."""

    def write(settings: dict) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, task: Path) -> Path:
    """The run folder of a short run of both stages that probed all held-out rows. Tests must not modify it."""
    folder = tmp_path_factory.mktemp("finished")
    stage = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 2,
             "learning_rate": 1e-2, "disable_tqdm": True}  # fmt: skip
    settings = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(task / "model")},
        "data": {"train": str(task / "train.jsonl"), "heldout": str(task / "heldout_many.jsonl"), "max_length": 40},
        "sft": {**stage, "hub_token": "hf_secret"},
        "dpo": {**stage, "logp_floor": -4.0, "tau": 2.0},
        "probes": {"rows": 40, "caption_rows": 12},
        "sampling": {"max_new_tokens": 6},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    torch.set_num_threads(1)
    assert main(["run", str(folder / "config.yaml")]) == 0
    return folder / "run"
