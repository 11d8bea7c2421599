"""The fused head on the model classes that people train, also under peft, and on classes that it refuses."""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf

from cwdpo_kernels import linear_logprob
from cwdpo_kernels.integrations.hugging_face import HeadError, attach_head, check_head

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import CLASSES, TEXT, TEXT_TOKENS, VISION, llama, llava, qwen2_5_vl

EXPECTED = {"gemma2": (1.0, 3.0), "cohere2": (0.25, None)}  # of all others: no scale, no soft cap


@pytest.fixture(params=CLASSES)
def tiny(request):
    """(name, model, inputs, labels): the text after the image is labeled."""
    torch.manual_seed(1)
    model, inputs = CLASSES[request.param]()
    return request.param, model, inputs, answer_labels(inputs)


def answer_labels(inputs):
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -TEXT_TOKENS - 1 : -1] = inputs["input_ids"][:, -TEXT_TOKENS:]
    return labels


def own_logp(model, inputs, labels):
    logits = model(**inputs).logits.double()
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logp * (labels >= 0)


def fused_logp(model, inputs, labels):
    return model(**inputs, head_op=lambda hidden, head: linear_logprob(hidden, head, labels))


def compare(model, inputs, labels, expected_from=None):
    """Compare values and the gradient of every parameter with those of the model's own logits."""
    twin = copy.deepcopy(model) if expected_from is None else expected_from
    weights = torch.rand(labels.shape, generator=torch.Generator(torch.get_default_device()).manual_seed(3))
    fused, own = fused_logp(model, inputs, labels), own_logp(twin, inputs, labels)
    torch.testing.assert_close(fused.double(), own, rtol=1e-4, atol=1e-4)
    (fused * weights).sum().backward()
    (own * weights).sum().backward()
    compared = 0
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)
            compared += bool(other.grad.any())
    assert compared


def test_fused_logp_and_gradients_equal_the_models_own(tiny):
    name, model, inputs, labels = tiny
    info = attach_head(model)
    expected = EXPECTED.get(name, (1.0, None))
    assert (info.transform.scale, info.transform.softcap) == expected
    assert info.difference < 1e-4
    assert check_head(model, inputs, labels) < 1e-4
    compare(model, inputs, labels)


def lora(model, targets, **options):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("order", ["attached first", "peft first"])
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj"]], ids=["on the head", "below it"])
@pytest.mark.parametrize("make", [llava, qwen2_5_vl, llama])
def test_lora(make, targets, order):
    model, inputs = make()
    labels = answer_labels(inputs)
    if order == "attached first":
        attach_head(model)
    wrapped = lora(model, targets)
    info = attach_head(wrapped)
    assert info is attach_head(model)
    compare(wrapped, inputs, labels)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.grad is not None]
    assert any("lm_head" in name for name in trained) == ("lm_head" in targets)
    with wrapped.disable_adapter():
        base = fused_logp(wrapped, inputs, labels)
        torch.testing.assert_close(base.double(), own_logp(wrapped, inputs, labels), rtol=1e-4, atol=1e-4)
    assert (base - fused_logp(wrapped, inputs, labels)).abs().max() > 1e-2
    wrapped.merge_adapter()
    merged = fused_logp(wrapped, inputs, labels)
    torch.testing.assert_close(merged.double(), own_logp(wrapped, inputs, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["attached first", "peft first"])
def test_a_fully_trained_head_with_lora_elsewhere(order):
    model, inputs = llava()
    labels = answer_labels(inputs)
    if order == "attached first":
        attach_head(model)
    wrapped = lora(model, ["q_proj"], modules_to_save=["lm_head"])
    attach_head(wrapped)
    before = fused_logp(wrapped, inputs, labels)
    with torch.no_grad():
        wrapped.get_output_embeddings().modules_to_save.default.weight.mul_(1.1)
    compare(wrapped, inputs, labels)
    assert (before - fused_logp(wrapped, inputs, labels)).abs().max() > 1e-2
    with wrapped.disable_adapter():
        base = fused_logp(wrapped, inputs, labels)
        torch.testing.assert_close(base.double(), own_logp(wrapped, inputs, labels), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:peft.utils.warning.PeftWarning")
def test_lora_with_a_bias():
    model, inputs = llama()
    wrapped = lora(model, ["lm_head"], lora_bias=True)
    with torch.no_grad():
        wrapped.get_output_embeddings().lora_B.default.bias.normal_()
    attach_head(wrapped)
    compare(wrapped, inputs, answer_labels(inputs))


def test_dora_on_the_head_is_refused():
    wrapped = lora(llama()[0], ["lm_head"], use_dora=True)
    with pytest.raises(HeadError, match=r"linear output head .* or LoRA on one, got"):
        attach_head(wrapped)


def test_lora_dropout_equals_the_layers():
    model, inputs = llama()
    labels = answer_labels(inputs)
    wrapped = lora(model, ["lm_head"], lora_dropout=0.5).train()
    attach_head(wrapped)
    values = []
    for logp in (fused_logp, own_logp):
        torch.manual_seed(4)
        values.append(logp(wrapped, inputs, labels).double())
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
    assert (values[0] - fused_logp(wrapped.eval(), inputs, labels)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    for make in (llava, functools.partial(qwen2_5_vl, tied=True), *(CLASSES[name] for name in EXPECTED)):
        model, inputs = make()
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        info = attach_head(model.to(dtype))
        assert info.dtype == dtype
        assert info.transform.softcap == (3.0 if type(model).__name__ == "Gemma2ForCausalLM" else None)
        check_head(model, inputs, answer_labels(inputs))


def blip2():
    text = hf.OPTConfig(vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2,
                        max_position_embeddings=64, word_embed_proj_dim=32)  # fmt: skip
    former = hf.Blip2QFormerConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                   encoder_hidden_size=16, vocab_size=40)  # fmt: skip
    vision = hf.Blip2VisionConfig(**VISION, image_size=8, patch_size=4)
    return hf.Blip2ForConditionalGeneration(hf.Blip2Config(vision_config=vision, qformer_config=former,
                                                           text_config=text))  # fmt: skip


def llama4():
    text = hf.Llama4TextConfig(**TEXT, intermediate_size_mlp=48, num_local_experts=2, head_dim=16)
    vision = hf.Llama4VisionConfig(**VISION, image_size=8, patch_size=4, vision_output_dim=16, projector_input_dim=16,
                                   projector_output_dim=16)  # fmt: skip
    return hf.Llama4ForConditionalGeneration(hf.Llama4Config(text_config=text, vision_config=vision))


@pytest.mark.parametrize("make", [blip2, llama4])
def test_a_model_whose_head_is_not_on_top_of_its_backbone_is_refused(make):
    model = make()
    with pytest.raises(HeadError, match=r"attach_head: expected \w+ to have .*, got "):
        attach_head(model)
    assert "forward" not in vars(model)
