"""`model.freeze` holds, whichever way LoRA would reach a frozen module."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText

from cwdpo_trainer.cli import main
from cwdpo_trainer.config.arguments import LoraArguments, ModelArguments
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.models.loading import load_model
from cwdpo_trainer.models.reference import freeze_reference

BOTH = ["q_proj", "v_proj"]  # in the vision tower (2 layers) and in the language model (1)


def load(task: Path, frozen: list[str], path: Path | None = None, **lora):
    settings = ModelArguments(str(task / "model"), freeze=frozen)
    return load_model(settings, str(path or task / "model"), LoraArguments(r=2, **lora))


def trained(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("lora", "left_out"),
    [
        ({"target_modules": BOTH}, 4),
        ({"target_modules": "all-linear"}, 12),
        ({"target_modules": r".*\.(q_proj|v_proj)"}, 4),
        ({"target_modules": BOTH, "exclude_modules": ["language_model.layers.0.self_attn.v_proj"]}, 4),
        ({"target_modules": BOTH, "exclude_modules": r".*language_model.*v_proj"}, 4),
        ({"target_modules": BOTH, "exclude_modules": ["vision_tower.encoder.layers.0.self_attn.q_proj"]}, 3),
    ],
)
def test_modules_inside_a_frozen_one_get_no_adapter(task, capsys, lora, left_out):
    frozen = load(task, ["vision_tower"], **lora)
    names = trained(frozen)
    assert names
    assert not any("vision_tower" in name for name in names)
    assert not any("vision_tower" in name and "lora" in name for name, _ in frozen.named_parameters())
    assert f"lora: {left_out} modules inside vision_tower: no adapter (model.freeze)\n" in capsys.readouterr().out
    free = load(task, [], **lora)  # the adapters of the other modules are the same ones
    assert names == [name for name in trained(free) if "vision_tower" not in name]


def test_an_error_says_that_everything_is_frozen(task):
    with pytest.raises(InputError, match=r"config: lora: expected .* outside of model.freeze \(vision_tower, language"):
        load(task, ["vision_tower", "language_model"], target_modules=BOTH)
    with pytest.raises(InputError, match="names of modules, such as"):
        load(task, ["vision"], target_modules=BOTH)


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "modules_to_save"])
def test_a_name_that_no_module_has_is_named(task, option):
    """peft ignores it where another name of the list matches."""
    lora = {"target_modules": BOTH} | {option: ["q_proj", "q_porj"]}
    with pytest.raises(InputError, match=f"config: lora.{option}: expected names of the model's modules, got q_porj$"):
        load(task, [], **lora)


def test_an_error_says_that_no_weight_is_left_to_train(task):
    settings = ModelArguments(str(task / "model"), freeze=["model", "lm_head"])
    with pytest.raises(InputError, match=r"model\.freeze: expected weights outside of these modules, got \['model', "):
        load_model(settings, str(task / "model"), None)


def test_a_module_saved_in_full_is_frozen_too(task, capsys):
    names = trained(load(task, ["vision_tower"], target_modules=BOTH, modules_to_save=["pre_layrnorm"]))
    assert names
    assert not any("vision_tower" in name for name in names)
    assert "1 module inside vision_tower: not trained in full" in capsys.readouterr().out


@pytest.fixture
def adapter(task, tmp_path):
    """An adapter of both parts of the model that changes what the model computes."""
    model = load(task, [], target_modules=BOTH)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("as_model", [False, True])
def test_a_loaded_adapter_is_frozen_inside_of_it(task, adapter, capsys, as_model):
    how = {"path": adapter} if as_model else {"adapter": str(adapter)}
    policy = load(task, ["vision_tower"], **how)
    assert "lora: 4 modules inside vision_tower: adapter kept as it is" in capsys.readouterr().out
    expected = [name for name in trained(load(task, [], adapter)) if "vision_tower" not in name]
    assert trained(policy) == expected
    freeze_reference(policy)
    assert trained(policy) == expected  # peft unfreezes all adapters when it switches them
    with pytest.raises(InputError, match=r"model.freeze: expected an adapter with weights outside"):
        load(task, ["vision_tower", "language_model"], adapter)


def test_nothing_frozen_moves_in_a_run(settings, write_config, task):
    settings["model"]["freeze"] = ["vision_tower"]
    settings["lora"] = {"r": 2, "lora_alpha": 4, "target_modules": BOTH}
    settings["sft"] |= {"max_steps": 2}
    settings["dpo"] |= {"max_steps": 2}
    assert main(["run", str(write_config(settings))]) == 0
    run = Path(settings["output_dir"])
    for stage in ("sft", "cwdpo"):
        stored = peft.utils.load_peft_weights(str(run / stage), device="cpu")
        assert stored
        assert not any("vision_tower" in name for name in stored)
        assert "vision_tower" in json.loads((run / stage / "adapter_config.json").read_text())["exclude_modules"]
    # Peft alone, with the saved settings, gives the same model.
    base = AutoModelForImageTextToText.from_pretrained(task / "model")
    model = peft.PeftModel.from_pretrained(base, run / "cwdpo")
    assert sum("lora_B" in name for name, _ in model.named_parameters()) == 2
