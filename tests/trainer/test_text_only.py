"""Text-only models have a tokenizer and no processor. They train, check, probe, evaluate and sample like the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from cwdpo_trainer.cli import main
from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.lengths import LengthMeter
from cwdpo_trainer.data.rows import load_rows
from cwdpo_trainer.data.screening import bad_rows
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.models.loading import load_processor

sys.path.insert(0, str(Path(__file__).parent))
from tiny_text import CONFIGS, save_text_model, text_rows, tokenizer, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/, and train and held-out pairs in both forms of prompts."""
    path = tmp_path_factory.mktemp("text")
    save_text_model(path / "model")
    for form, chat in (("text", False), ("chat", True)):
        write(path / f"train_{form}.jsonl", text_rows(range(32), chat))
        write(path / f"heldout_{form}.jsonl", text_rows(range(32, 40), chat))
    return path


def config(folder, run, form, **changes):
    stage = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
             "save_steps": 2, "disable_tqdm": True}  # fmt: skip
    settings = {
        "output_dir": str(run),
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / f"train_{form}.jsonl"), "heldout": str(folder / f"heldout_{form}.jsonl"),
                 "max_length": 32},
        "sft": stage,
        "dpo": {**stage, "logp_floor": "auto", "tau": "auto", "onpolicy_fraction": 1.0},
        "probes": {"rows": 8, "caption_rows": 8},
        "sampling": {"max_new_tokens": 6, "samples": 4},
        **changes,
    }  # fmt: skip
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(("form", "lora"), [("text", None), ("chat", LORA)])
def test_both_stages_train_and_the_result_is_measured(folder, tmp_path, capsys, form, lora):
    path = config(folder, tmp_path / "run", form, **({} if lora is None else {"lora": lora}))
    assert main(["check", str(path)]) == 0, capsys.readouterr().out
    assert "self-test: LlamaForCausalLM" in capsys.readouterr().out
    assert main(["run", str(path)]) == 0
    run = tmp_path / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["after_cwdpo"]["probes"]["onpolicy_logp"] < 0
    assert metrics["after_sft"]["probes"]["chosen_delta_logp"] != 0
    log = [json.loads(line) for line in (run / "checkpoints/dpo/negatives_0.jsonl").read_text().splitlines()]
    assert any(entry["origin"] == "onpolicy" for entry in log)
    card = ModelCard.load(run / "cwdpo/README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert "vision-language" not in card.data.tags
    assert main(["eval", str(run), str(folder / f"heldout_{form}.jsonl")]) == 0
    assert main(["probe", str(run), str(folder / f"heldout_{form}.jsonl")]) == 0
    assert "chosen" in capsys.readouterr().out
    # The folder is an ordinary model folder.
    assert AutoTokenizer.from_pretrained(run / "cwdpo")("ask red")["input_ids"] == tokenizer()("ask red")["input_ids"]
    if lora is None:
        start, end = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "model", run / "cwdpo"))
        assert not torch.equal(start.lm_head.weight, end.lm_head.weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_classes_of_text_models_are_checked(folder, tmp_path, name):
    save_text_model(tmp_path / "model", name)
    path = config(folder, tmp_path / "run", "chat", model={"path": str(tmp_path / "model")})
    assert main(["check", str(path)]) == 0


def test_a_model_that_is_not_causal_is_refused(folder, tmp_path, capsys):
    settings = json.loads((folder / "model/config.json").read_text()) | {"model_type": "t5"}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(settings))
    path = config(folder, tmp_path / "run", "text", model={"path": str(tmp_path / "model")})
    assert main(["run", str(path)]) == 2
    assert "model_type: expected a vision-language model with its processor, or a text-only model" in (
        capsys.readouterr().err
    )


def test_prompts_are_tokenized_as_the_tokenizer_does(folder):
    made = load_processor(str(folder / "model"))
    collator = PairCollator(made)
    text, chat = (load_rows(folder / f"train_{form}.jsonl")[:2] for form in ("text", "chat"))
    for rows, expected in (
        (text, ["ask and left red", "ask and right green"]),
        (chat, ["<user> ask and left red </s> <bot>", "<user> ask and right green </s> <bot>"]),
    ):
        prompts = collator.prompts(rows)
        assert set(prompts) == {"input_ids", "attention_mask"}
        assert prompts["input_ids"].tolist() == made(expected, add_special_tokens=False)["input_ids"]
        inputs, labels = collator.join(prompts, collator(rows)["chosen"])
        assert made.decode(labels[0][labels[0] != -100]) == "a red square </s>"
        assert inputs["input_ids"].shape == labels.shape
    assert made.pad_token == "</s>"  # it had none
    assert LengthMeter(collator)(chat[0])[:2] == (7, 0)


@pytest.mark.parametrize("form", ["column", "part"])
def test_a_row_with_an_image_is_a_bad_row(folder, tmp_path, capsys, form):
    Image.new("RGB", (4, 4)).save(tmp_path / "image.png")
    rows = text_rows(range(12), chat=True)
    if form == "column":
        rows[3]["images"] = ["image.png"]
    else:
        rows[3]["prompt"] = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "ask red"}]}]
    write(tmp_path / "train.jsonl", rows)
    errors = bad_rows(load_rows(tmp_path / "train.jsonl"), PairCollator(load_processor(str(folder / "model"))))
    (error,) = errors.values()
    assert isinstance(error, InputError)
    expected = "images: expected none, because the model reads text only, got 1 image"
    assert str(error) == f"{tmp_path}/train.jsonl:4: {expected}"
    data = {"train": str(tmp_path / "train.jsonl"), "heldout": str(folder / "heldout_chat.jsonl")}
    path = config(folder, tmp_path / "run", "chat", data=data)
    assert main(["run", str(path)]) == 2
    assert str(error) in capsys.readouterr().err
    assert main(["check", str(path)]) == 1
    out = capsys.readouterr().out
    assert "error image_for_text_model: 1 of 12 rows of data.train" in out
    assert "train.jsonl:4: 1 image, but the model reads text only" in out
    assert main(["run", str(path), "data.skip_bad_rows=true", "sft.max_steps=1", "dpo=off"]) == 0


def test_messages_need_a_chat_template(folder, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    AutoModelForCausalLM.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    tokenizer(template=False).save_pretrained(tmp_path / "model")
    path = config(folder, tmp_path / "run", "chat", model={"path": str(tmp_path / "model")})
    assert main(["run", str(path)]) == 2
    assert "chat template: expected a template that renders the messages of this row" in capsys.readouterr().err
    assert main(["sft", str(config(folder, tmp_path / "other", "text", model={"path": str(tmp_path / "model")}))]) == 0
