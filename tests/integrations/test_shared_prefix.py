"""Models on token trees against the same models on separate sequences: log-probs and gradients."""

import copy
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf

from cwdpo_kernels import linear_logprob
from cwdpo_kernels.integrations import shared_prefix
from cwdpo_kernels.integrations.hugging_face import attach_head
from cwdpo_kernels.integrations.shared_prefix import (
    TreesUnsupported,
    enable_trees,
    token_tree,
    tree_batch,
    why_no_trees,
)
from cwdpo_trainer.data.collator import with_answers

sys.path.append(str(Path(__file__).parents[1] / "trainer"))
import tiny_models

ANSWERS = [[[11, 12, 13], [14, 15, 16, 17, 18, 19]], [[11, 20, 21, 22, 23], [24]]]
TYPES = {"paligemma": {"token_type_ids": 1}}


def prompts_of(inputs):
    """The zoo's batch as prompts of different lengths."""
    prompts = {key: value.clone() for key, value in inputs.items()}
    prompts["attention_mask"][1, -2:] = 0
    return prompts


def separate(model, prompts, answers, types):
    batch = with_answers(prompts, *answers, pad_id=0, answer_types=types)
    logp = model(**batch.inputs, head_op=lambda hidden, head: linear_logprob(hidden, head, batch.labels))
    return logp[batch.labels >= 0]


def on_tree(model, prompts, answers, types):
    batch = tree_batch(model, prompts, answers, types)
    with token_tree(batch.tree):
        return model(
            **batch.inputs, head_op=lambda hidden, head: linear_logprob(batch.packed(hidden), head, batch.labels)
        )


def gradients(model, logp):
    weights = torch.linspace(-1, 1, len(logp))
    (logp * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def assert_equal(model, prompts, types, answers=ANSWERS):
    expected = separate(model, prompts, answers, types)
    expected_grads = gradients(model, expected)
    enable_trees(model)
    logp = on_tree(model, prompts, answers, types)
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    grads = gradients(model, logp)
    assert grads.keys() == expected_grads.keys()
    largest = max(grad.abs().max().item() for grad in expected_grads.values())
    for name, grad in expected_grads.items():
        scale = max(grad.abs().max().item(), 1e-4 * largest)
        # The softmax does not depend on a key's bias: its gradient is 0, and what is computed is a rounding error.
        allowed = largest * torch.finfo(grad.dtype).eps if name.endswith("k_proj.bias") else 1e-5 * scale
        torch.testing.assert_close(grads[name], grad, atol=allowed, rtol=0, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name", tiny_models.CLASSES)
def test_equals_separate_sequences(name):
    model, inputs = tiny_models.CLASSES[name]()
    attach_head(model)
    assert_equal(model, prompts_of(inputs), TYPES.get(name, {}))


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llama"])
def test_gradient_checkpointing(name):
    model, inputs = tiny_models.CLASSES[name]()
    attach_head(model)
    model.train()
    # transformers 5.23 renamed it
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    assert_equal(model, prompts_of(inputs), {})


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_lora(name):
    model, inputs = tiny_models.CLASSES[name]()
    attach_head(model)
    config = peft.LoraConfig(r=4, target_modules=r".*(language_model|layers).*(q_proj|v_proj)", init_lora_weights=False)
    assert_equal(peft.get_peft_model(model, config), prompts_of(inputs), {})


@pytest.mark.parametrize("name", ["gemma3", "cohere2", "gemma2"])
def test_windows_shorter_than_the_answers(name):
    """The zoo's windows are 8 tokens. These answers run past the prompt's end of the window, and past their own."""
    model, inputs = tiny_models.CLASSES[name]()
    attach_head(model)
    generator = torch.Generator().manual_seed(0)
    answers = [[torch.randint(10, 40, (count,), generator=generator).tolist() for count in (20, 9)] for _ in range(3)]
    assert_equal(model, prompts_of(inputs), {}, answers)


def test_prompts_with_different_numbers_of_answers():
    model, inputs = tiny_models.llama()
    attach_head(model)
    enable_trees(model)
    prompts = prompts_of(inputs)
    (first, second), (third, _) = ANSWERS
    logp = on_tree(model, prompts, [[first, second], [None, third]], {})
    batch = with_answers(prompts, [first, second], [third, third], pad_id=0)
    expected = model(**batch.inputs, head_op=lambda hidden, head: linear_logprob(hidden, head, batch.labels))
    kept = [expected[row][batch.labels[row] >= 0] for row in (0, 1, 3)]
    torch.testing.assert_close(logp, torch.cat(kept), atol=1e-5, rtol=1e-5)


def test_outside_of_a_tree_nothing_changes():
    model, inputs = tiny_models.gemma3()
    attach_head(model)
    logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
    enable_trees(model)
    enable_trees(model)
    assert model.config.get_text_config()._attn_implementation == "tree_sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(**inputs).logits, logits, atol=0, rtol=0)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


def test_saved_models_do_not_name_the_attention(tmp_path):
    model, _ = tiny_models.llama()
    enable_trees(model)
    model.save_pretrained(tmp_path)
    assert "tree" not in (tmp_path / "config.json").read_text()
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_copy_runs_on_trees_too():
    model, inputs = tiny_models.qwen2_5_vl()
    attach_head(model)
    enable_trees(model)
    prompts = prompts_of(inputs)
    expected = on_tree(model, prompts, ANSWERS, {})
    torch.testing.assert_close(on_tree(copy.deepcopy(model), prompts, ANSWERS, {}), expected, atol=0, rtol=0)


def test_autocast():
    model, inputs = tiny_models.llava()
    attach_head(model)
    prompts = prompts_of(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected = separate(model, prompts, ANSWERS, {})
        enable_trees(model)
        logp = on_tree(model, prompts, ANSWERS, {})
    torch.testing.assert_close(logp, expected, atol=0.05, rtol=0.02)


def test_recurrent_layers_are_refused():
    config = hf.Qwen3NextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.Qwen3NextForCausalLM(config)
    expected = r"Qwen3NextForCausalLM has layers with a recurrent state \(linear_attention\), which cannot branch"
    with pytest.raises(TreesUnsupported, match=expected):
        enable_trees(model)


def test_dropout_in_the_attention_is_refused():
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**tiny_models.TEXT, attention_dropout=0.1))
    assert why_no_trees(model) == "LlamaForCausalLM has a dropout of 0.1 in its attention (attention_dropout)"


def test_masks_of_another_kind_are_refused():
    """A mask that is neither causal nor a window: tokens see those at even distances only."""
    model, inputs = tiny_models.llama()
    enable_trees(model)
    mask = shared_prefix.AttentionMaskInterface()["tree_sdpa"]
    batch = tree_batch(model, prompts_of(inputs), ANSWERS)
    with token_tree(batch.tree), pytest.raises(TreesUnsupported, match="neither causal nor a sliding window"):
        mask(mask_function=lambda b, h, q, k: (q - k) % 2 == 0)


def test_chunked_attention_is_refused():
    """Its mask looks like a window from some tokens, and like full attention while all sequences fit in a chunk."""
    text = {**tiny_models.TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 16}
    with torch.device("meta"):
        model = hf.Llama4ForCausalLM(hf.Llama4TextConfig(**text, attention_chunk_size=16))
    with pytest.raises(TreesUnsupported, match=r"Llama4ForCausalLM has attention of another kind .*chunked_attention"):
        enable_trees(model)
