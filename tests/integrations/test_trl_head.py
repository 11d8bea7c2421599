"""The head that `use_fused_head` gives TRL's trainers: its values and gradients, and what it leaves alone."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
import trl.trainer.utils
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cwdpo_kernels.integrations import trl_head
from cwdpo_kernels.integrations.trl_head import PER_TOKEN, add_fused_lm_head

sys.path.insert(0, str(Path(__file__).parents[1]))
import mock_gpu

# TRL 1.16 still uses names that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

ALL = tuple(PER_TOKEN)
THEIRS = trl.trainer.utils.add_fused_lm_head
TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"head_dim": 16, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


def llama(**options):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, **options))


def gemma3_with_images():
    """Its text config has a soft cap, which this class does not apply."""
    text = {**TEXT, "head_dim": 16, "final_logit_softcapping": 2.0}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=96)
    return hf.Gemma3ForConditionalGeneration(config)


# What the config says of the logits: nothing, a soft cap, a factor, a divisor, a cap that the model does not apply.
MODELS = {
    "llama": llama,
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**TEXT, head_dim=16, final_logit_softcapping=3.0)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**TEXT, logit_scale=0.25)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**TEXT, logits_scaling=4.0)),
    "gemma3 with images": gemma3_with_images,
}


def build(name="llama", **options):
    torch.manual_seed(0)
    return MODELS[name](**options).eval()


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (2, 9), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 6:] = -100
    return ids, labels


def truth(model, ids, labels, temperature=1.0):
    """The fields from the logits of the model's own forward in float64."""
    logits = copy.deepcopy(model).double()(input_ids=ids).logits[:, :-1] / temperature
    mask = labels[:, 1:] != -100
    logp, p = logits.log_softmax(-1), logits.softmax(-1)
    label = labels[:, 1:].clamp(min=0)
    fields = {
        "log_probs": logp.gather(-1, label[..., None]).squeeze(-1), "entropy": -(p * logp).sum(-1),
        "log_sum_sq_probs": (p * p).sum(-1).log(), "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == label,
    }  # fmt: skip
    return {name: value * mask for name, value in fields.items()}, mask


def check(output, expected, mask, names=ALL):
    for name in names:
        torch.testing.assert_close(output[name].double(), expected[name].double(), rtol=2e-5, atol=2e-5, msg=name)
        assert output[name].dtype == (torch.bool if name == "is_top1" else torch.float32)
        assert not output[name][~mask].any()
    assert torch.equal(output["label_mask"], mask)


@pytest.mark.parametrize("name", MODELS)
def test_fields_equal_those_of_the_models_own_logits(name):
    model = build(name)
    ids, labels = batch()
    expected, mask = truth(model, ids, labels, temperature=0.7)
    add_fused_lm_head(model, temperature=0.7, outputs=ALL)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    check(output, expected, mask)
    assert output.loss.item() == pytest.approx(-expected["log_probs"].sum().item() / mask.sum().item(), rel=1e-5)
    assert output.aux_loss is None
    halves = model(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=torch.tensor(22))
    assert halves.loss.item() == pytest.approx(output.loss.item() * mask.sum().item() / 22, rel=1e-6)


def test_gradients_of_log_probs_and_entropy():
    model = build()
    ids, labels = batch()
    twin = copy.deepcopy(model).double()
    logp = (twin(input_ids=ids).logits[:, :-1] / 1.3).log_softmax(-1)
    mask = labels[:, 1:] != -100
    picked = logp.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)[mask].sum()
    (picked + 0.3 * -(logp.exp() * logp).sum(-1)[mask].sum()).backward()
    add_fused_lm_head(model, temperature=1.3, outputs=("log_probs", "entropy"))
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    (output.log_probs.sum() + 0.3 * output.entropy.sum()).backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    assert model.lm_head.weight.grad.abs().max() > 0.1


def test_frozen_head_learns_whether_the_entropy_has_a_gradient(monkeypatch):
    """Gradients are right from the first step on. `token_stats` hears what the steps before needed."""
    expected, actual_stats = [], trl_head.token_stats

    def token_stats(*args, expect_entropy_grad):
        expected.append(expect_entropy_grad)
        return actual_stats(*args, expect_entropy_grad=expect_entropy_grad)

    monkeypatch.setattr(trl_head, "token_stats", token_stats)
    model = build()
    model.lm_head.weight.requires_grad_(False)
    ids, labels = batch()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    grads = {}
    for coefficient in (0.0, 0.0, 0.3, 0.3, 0.3):
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        loss = output.log_probs.sum()
        loss = loss + coefficient * output.entropy.sum() if coefficient else loss
        (grad,) = torch.autograd.grad(loss, model.base_model.norm.weight)
        torch.testing.assert_close(grad, grads.setdefault(coefficient, grad), rtol=1e-5, atol=1e-6)
    assert expected == [False, False, False, True, True]
    twin = build().double()
    logp = twin(input_ids=ids).logits[:, :-1].log_softmax(-1)
    mask = labels[:, 1:] != -100
    picked = logp.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1)[mask].sum()
    for coefficient, grad in grads.items():
        loss = picked + coefficient * -(logp.exp() * logp).sum(-1)[mask].sum()
        (exact,) = torch.autograd.grad(loss, twin.base_model.norm.weight, retain_graph=True)
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-5)


def test_frozen_head_under_checkpointing():
    """The forward that checkpointing runs again in backward saves what the first one has saved."""
    model = build()
    model.lm_head.weight.requires_grad_(False)
    ids, labels = batch()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))

    def loss():
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        return output.log_probs.sum() + 0.3 * output.entropy.sum()

    norm = model.base_model.norm.weight
    for _ in range(3):
        norm.grad = None
        checkpoint(loss, use_reentrant=False).backward()
        torch.testing.assert_close(norm.grad, torch.autograd.grad(loss(), norm)[0], rtol=1e-5, atol=1e-6)


def test_only_what_is_asked_for():
    ids, labels = batch()
    for outputs in (("log_probs",), (), ("entropy", "is_top1"), ["log_probs", "mean_logits"]):
        model = build()
        add_fused_lm_head(model, outputs=outputs)
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        assert {name for name in ALL if name in output} == {"log_probs", *outputs}


def test_shifted_labels_and_missing_labels():
    model = build()
    ids, labels = batch()
    add_fused_lm_head(model)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    aligned = model(input_ids=ids, labels=labels, shift_labels=shifted, fused_lm_head=True)
    assert aligned.log_probs.shape == ids.shape
    torch.testing.assert_close(aligned.log_probs[:, :-1], output.log_probs)
    assert not aligned.log_probs[:, -1].any()
    with pytest.raises(TypeError, match="LlamaForCausalLM: expected fused_lm_head=True to come with labels, got None"):
        model(input_ids=ids, fused_lm_head=True)


def test_batch_without_labels_gives_a_differentiable_zero():
    for outputs in (("log_probs",), ALL):
        model = build()
        ids, labels = batch()
        add_fused_lm_head(model, outputs=outputs)
        output = model(input_ids=ids, labels=torch.full_like(labels, -100), fused_lm_head=True)
        assert output.loss.item() == 0
        output.loss.backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("by_config", [True, False])
def test_router_loss(by_config):
    torch.manual_seed(0)
    options = {"output_router_logits": by_config, "router_aux_loss_coef": 0.5}
    model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**TEXT, **EXPERTS, **options)).eval()
    ids, labels = batch()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    asked = {} if by_config else {"output_router_logits": True}
    own = model(**inputs, **asked)
    add_fused_lm_head(model)
    output = model(**inputs, **asked, fused_lm_head=True)
    assert output.aux_loss.item() == pytest.approx(own.aux_loss.item(), rel=1e-6)
    assert output.loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
    output.loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.any()
    if not by_config:
        assert model(**inputs, fused_lm_head=True).aux_loss is None


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], "modules_to_save"])
def test_adapters(targets):
    """LoRA on the head, which TRL's own head ignores, and a trained copy of it."""
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    config = LoraConfig(r=4, **(saved if targets == "modules_to_save" else {"target_modules": targets}))
    ids, labels = batch()
    model = build()
    base, mask = truth(model, ids, labels)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    expected, _ = truth(model, ids, labels)
    add_fused_lm_head(model.get_base_model(), outputs=ALL)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    check(output, expected, mask)
    output.log_probs.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert any("lm_head" in name for name in trained) == (targets != ["q_proj"])
    with model.disable_adapter():
        check(model(input_ids=ids, labels=labels, fused_lm_head=True), base, mask)


def test_prompt_tuning():
    model = get_peft_model(build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    ids, labels = batch()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 3:-1]
    mask = labels[:, 1:] != -100
    expected = logits.log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1) * mask
    add_fused_lm_head(model.get_base_model())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    output = model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs[:, 3:], expected, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert model.prompt_encoder.default.embedding.weight.grad.any()


@pytest.mark.parametrize("by_trl", [False, True], ids=["weights in bfloat16", "as GRPOTrainer patches the head"])
def test_head_in_float32(by_trl):
    """`cast_lm_head_to_fp32`: GRPOTrainer casts the head and replaces its forward before it asks for the fused head."""
    model = build().to(torch.bfloat16)
    head = model.lm_head
    if by_trl:
        head.float()
        head.forward = lambda hidden: F.linear(hidden.float(), head.weight)
    ids, labels = batch()
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    logp = (hidden.double() @ head.weight.double().T / 0.9).log_softmax(-1)
    expected = logp.gather(-1, labels[:, 1:, None].clamp(min=0)).squeeze(-1) * (labels[:, 1:] != -100)
    add_fused_lm_head(model, temperature=0.9, cast_lm_head_to_fp32=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        torch.testing.assert_close(output.log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    if by_trl:
        assert model(input_ids=ids).logits.dtype == torch.float32  # by the forward that TRL gave the head
        head.forward = lambda hidden: F.linear(hidden.float(), head.weight)
        add_fused_lm_head(model, 0.9, cast_lm_head_to_fp32=True)  # of a second trainer, which patches the head again
        again = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
        torch.testing.assert_close(again.double(), expected, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert head.weight.grad.dtype == head.weight.dtype


@pytest.mark.parametrize("outputs", [("log_probs",), ALL], ids=["log_probs", "all"])
def test_head_on_another_device_than_the_backbone(outputs):
    """As `device_map` may place it."""
    ids, labels = batch()
    model = build()
    expected, mask = truth(model, ids, labels)
    add_fused_lm_head(model, outputs=outputs)
    with mock_gpu.running(), torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().to("cuda"), requires_grad=False)
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        assert output.log_probs.device.type == output.label_mask.device.type == output.loss.device.type == "cuda"
        fields = {name: output[name].cpu() for name in (*outputs, "label_mask")}
    check(fields, expected, mask, outputs)


def test_the_head_is_called_inside_the_models_forward():
    """So that the hooks of FSDP and DDP fire, which gather its weight and reduce its gradient."""
    model = build()
    ids, labels = batch()
    seen = []
    for module in (model, model.lm_head):
        module.register_forward_pre_hook(lambda module, args: seen.append(f"before {type(module).__name__}"))
        module.register_forward_hook(lambda module, args, output: seen.append(f"after {type(module).__name__}"))
    add_fused_lm_head(model, outputs=ALL)
    seen.clear()
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert seen == ["before LlamaForCausalLM", "before Linear", "after Linear", "after LlamaForCausalLM"]
    assert not output.log_probs._is_view()
    assert not output.entropy._is_view()


def test_the_models_own_forward_is_unchanged(tmp_path):
    plain, model = build(), build()
    add_fused_lm_head(model, temperature=0.5, outputs=ALL)
    ids, labels = batch()
    ours, own = model(input_ids=ids, labels=labels), plain(input_ids=ids, labels=labels)
    assert torch.equal(ours.logits, own.logits)
    assert torch.equal(ours.loss, own.loss)
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    model.save_pretrained(tmp_path)
    loaded = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.state_dict().keys() == plain.state_dict().keys()


def test_a_copy_has_a_head_of_its_own():
    model = build()
    ids, labels = batch()
    add_fused_lm_head(model)
    first = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(twin(input_ids=ids, labels=labels, fused_lm_head=True).log_probs, first)
    assert not torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_second_call_replaces_the_first():
    model = build()
    ids, labels = batch()
    add_fused_lm_head(model, temperature=3.0, outputs=ALL)
    add_fused_lm_head(model, outputs=("log_probs",))
    expected, mask = truth(model, ids, labels)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    check(output, expected, mask, ("log_probs",))
    assert output.entropy is None


def test_compiled():
    model = build()
    ids, labels = batch()
    expected, mask = truth(model, ids, labels)
    add_fused_lm_head(model, outputs=ALL)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    check(compiled(input_ids=ids, labels=labels, fused_lm_head=True), expected, mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "add_fused_lm_head: expected temperature to have value > 0, got 0.0"),
        ({"outputs": ("logits",)}, r"add_fused_lm_head: expected outputs to have names of log_probs, .*\('logits',\)"),
        ({"cast_lm_head_to_fp32": 1}, "add_fused_lm_head: expected cast_lm_head_to_fp32 to have type bool, got int"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        add_fused_lm_head(build(), **options)
