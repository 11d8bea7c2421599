"""`cwdpo merge`: the merged model has the logits of the base model with its adapter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cwdpo_trainer.cli import main
from cwdpo_trainer.config.arguments import LoraArguments, ModelArguments
from cwdpo_trainer.models.loading import load_model

sys.path.insert(0, str(Path(__file__).parent))
from tiny_text import save_text_model, tokenizer

IDS = torch.arange(5, 17)[None]


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True:UserWarning")  # what is tested
@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_a_merged_model_has_the_same_logits(tmp_path, capsys, name, targets):
    save_text_model(tmp_path / "model", name)
    path = str(tmp_path / "model")
    policy = load_model(ModelArguments(path), path, LoraArguments(r=2, target_modules=targets)).eval()
    with torch.no_grad():
        for part, parameter in policy.named_parameters():
            if "lora_B" in part:
                parameter.normal_()
    policy.save_pretrained(tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "full")]) == 0
    assert f"{tmp_path / 'full'}: the merged model; its logits are within " in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, policy(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "full").eos_token == "</s>"
    assert main(["merge", str(tmp_path / "adapter"), "--output", str(tmp_path / "full")]) == 2
    assert "--output: expected a folder that does not exist yet" in capsys.readouterr().err


def test_the_last_stage_of_a_run_is_merged(settings, write_config, capsys):
    settings["lora"] = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    del settings["dpo"]
    settings["sft"] |= {"max_steps": 1}
    run = Path(settings["output_dir"])
    assert main(["run", str(write_config(settings))]) == 0
    assert main(["merge", str(run)]) == 0
    assert f"{run}/merged: the merged model" in capsys.readouterr().out
    assert main(["eval", str(run / "merged"), settings["data"]["heldout"]]) == 0


def test_a_full_model_has_nothing_to_merge(task, capsys):
    assert main(["merge", str(task / "model")]) == 2
    assert "expected an adapter, as a run with LoRA saves, got none" in capsys.readouterr().err
