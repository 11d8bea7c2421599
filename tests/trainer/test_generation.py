"""Samples from prompts that are encoded once are those of `generate`. Models that cannot do that are named."""

import re
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from cwdpo_trainer.models.reference import AdapterReference
from cwdpo_trainer.negatives import generation
from cwdpo_trainer.negatives.generation import continuations

sys.path.append(str(Path(__file__).parent))
import tiny_models

OPTIONS = {
    "max_new_tokens": 5, "do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0, "pad_token_id": 0,
    "eos_token_id": [2], "use_cache": True,
}  # fmt: skip


def sample(model, inputs, shares_prompts, samples=3):
    """The samples, and the number of tokens that the model encoded."""
    encoded = []
    decoder = model.base_model.get_decoder()
    hook = decoder.layers[0].register_forward_pre_hook(lambda _, args: encoded.append(args[0].shape[:2].numel()))
    torch.manual_seed(7)
    with torch.no_grad():
        found = continuations(model, inputs, samples, shares_prompts, **OPTIONS)
    hook.remove()
    return found, sum(encoded)


def padded(inputs):
    """The inputs, the first row with text and then padding on its left, where a model may have either."""
    width, ids = 3, inputs["input_ids"]
    batch = dict(inputs)
    for key, value in inputs.items():
        if value.shape[:2] == ids.shape:
            batch[key] = torch.cat([torch.zeros(2, width, dtype=value.dtype), value], 1)
    batch["input_ids"][1, :width] = torch.tensor([1, 11, 12])
    batch["attention_mask"][1, :width] = 1
    return batch


@pytest.mark.parametrize("name", tiny_models.CLASSES)
def test_samples_are_those_of_generate(name, capsys):
    model, inputs = tiny_models.CLASSES[name]()
    inputs = padded(inputs)
    expected, all_tokens = sample(model, inputs, False)
    found, _ = sample(model, inputs, True)
    assert torch.equal(found, expected)
    found, tokens = sample(model, inputs, True)  # without the comparison of the first call
    assert torch.equal(found, expected)
    rows, length = inputs["input_ids"].shape
    saved = 3 * rows * length - (rows * (length - 1) + 3 * rows)  # the last token of a prompt is encoded per sample
    said = capsys.readouterr().out
    if name == "paligemma":  # prompts attend in both directions
        saved = 0
        assert re.fullmatch(r"sampling: .*PaliGemmaForC.*'s log-probs would be off by 0\.0001\d nats\n", said)
    assert (all_tokens - tokens, said == "") == (saved, name != "paligemma")


def test_a_reference_that_is_its_policy_without_adapters(capsys):
    model, inputs = tiny_models.qwen2_5_vl()
    expected, _ = sample(model, padded(inputs), False)
    policy = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    reference = AdapterReference(policy, None)
    for _ in range(2):
        torch.manual_seed(7)
        assert torch.equal(continuations(reference, padded(inputs), 3, True, **OPTIONS), expected)
    assert capsys.readouterr().out == ""


def test_a_model_that_cannot_go_on_is_named(monkeypatch, capsys):
    model, inputs = tiny_models.llama()
    expected, _ = sample(model, inputs, False)
    plain = generation._encoded_once

    def wrong(model, inputs, *rest):
        made = plain(model, inputs, *rest)
        return {**made, "input_ids": torch.ones_like(made["input_ids"])}

    def failing(*_):
        raise TypeError("no such cache")

    fails = "LlamaForCausalLM fails with a prompt encoded once: TypeError: no such cache"
    for broken, reason in ((failing, fails), (wrong, "LlamaForCausalLM's log-probs would be off by ")):
        generation._can_share.clear()
        monkeypatch.setattr(generation, "_encoded_once", broken)
        for _ in range(2):
            assert torch.equal(sample(model, inputs, True)[0], expected)
        assert capsys.readouterr().out.count(f"sampling: prompts are not shared: {reason}") == 1
