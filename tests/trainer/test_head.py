"""`attach_head`: same values and gradients, all inputs forwarded, unsupported models refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from cwdpo_kernels import linear_logprob
from cwdpo_kernels.integrations.hugging_face import HeadError, attach_head, check_head
from cwdpo_trainer.data.collator import with_answers


@pytest.fixture
def batch(collator, rows):
    pairs = collator(rows[:3])
    return with_answers(pairs["prompts"], pairs["chosen"], pairs["rejected"], pad_id=0)


def own_logp(model, batch):
    """Log-probs of the labels from full logits, in float64."""
    logits = model(**batch.inputs).logits.double()
    logp = logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logp * (batch.labels >= 0)


def fused_logp(model, batch):
    return model(**batch.inputs, head_op=lambda hidden, head: linear_logprob(hidden, head, batch.labels))


def test_values_and_gradients_equal_those_of_full_logits(model, batch):
    twin = copy.deepcopy(model)
    attach_head(model)
    weights = torch.rand(batch.labels.shape)
    fused, expected = fused_logp(model, batch), own_logp(twin, batch)
    torch.testing.assert_close(fused.double(), expected, rtol=1e-5, atol=1e-5)
    (fused * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_the_default_device_does_not_matter(model):
    """`torch.set_default_device("cuda")` is common in scripts. Another device than the CPU's stands for it here."""
    with torch.device("meta"):
        attach_head(model)


def test_every_key_reaches_the_backbone(model, batch):
    attach_head(model)
    seen = {}
    model.base_model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    extra = {"mm_token_type_ids": torch.zeros_like(batch.labels)}
    model(**batch.inputs, **extra, head_op=lambda hidden, head: None)
    assert seen.keys() == {*batch.inputs, "mm_token_type_ids", "use_cache"}


def test_generate_save_and_plain_forward_are_unchanged(model, batch, collator, rows, tmp_path):
    prompts = collator.prompts(rows[:2], padding_side="left")
    before = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    logits = model(**batch.inputs).logits
    attach_head(model)
    attach_head(model)  # a second call is harmless
    torch.testing.assert_close(model(**batch.inputs).logits, logits, rtol=0, atol=0)
    assert torch.equal(model.generate(**prompts, max_new_tokens=4, do_sample=False), before)
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.architectures == ["LlavaForConditionalGeneration"]
    torch.testing.assert_close(again(**batch.inputs).logits, logits, rtol=0, atol=0)


def test_a_copy_calls_its_own_head(model, batch):
    attach_head(model)
    twin = copy.deepcopy(model)
    before = fused_logp(model, batch)
    with torch.no_grad():
        twin.lm_head.weight.add_(torch.randn_like(twin.lm_head.weight))
        twin.base_model.language_model.norm.weight.mul_(2)
    torch.testing.assert_close(fused_logp(model, batch), before, rtol=0, atol=0)
    torch.testing.assert_close(fused_logp(twin, batch).double(), own_logp(twin, batch), rtol=1e-4, atol=1e-4)


def test_autocast_casts_hidden_states_and_head(model, batch):
    attach_head(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dtypes = model(**batch.inputs, head_op=lambda hidden, head: (hidden.dtype, head.weight.dtype))
        check_head(model, *batch)
    assert dtypes == (torch.bfloat16, torch.bfloat16)


def test_check_head_accepts_the_model_and_keeps_its_mode(model, batch):
    attach_head(model)
    model.train()
    check_head(model, *batch)
    assert model.training


class Changed(LlavaForConditionalGeneration):
    """A model that applies `change` to its logits."""

    change = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = self.change(outputs.logits)
        return outputs


CAP = 30.0


@pytest.mark.parametrize(
    ("change", "scale", "softcap"),
    [
        (lambda z: z, 1.0, None),
        (lambda z: z * 0.0625, 0.0625, None),
        (lambda z: z / 3, 1 / 3, None),
        (lambda z: CAP * torch.tanh(z / CAP), 1.0, CAP),
        (lambda z: CAP * torch.tanh(z * 2 / CAP), 2.0, CAP),
    ],
    ids=["none", "scale", "third", "softcap", "both"],
)
def test_the_transform_of_the_logits_is_measured(model, batch, change, scale, softcap):
    changed = Changed(model.config)
    changed.load_state_dict(model.state_dict())
    changed.change = change
    info = attach_head(changed)
    assert info.transform.scale == pytest.approx(scale, rel=1e-6)
    assert info.transform.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    torch.testing.assert_close(fused_logp(changed, batch).double(), own_logp(changed, batch), rtol=1e-5, atol=1e-5)


def masked(logits):
    return torch.cat([logits[..., :3], torch.full_like(logits[..., 3:4], -1e4), logits[..., 4:]], -1)


@pytest.mark.parametrize(
    "change",
    [masked, lambda z: z + 1, lambda z: -z, lambda z: z.clamp(-50, 50), lambda z: z[..., :-1], lambda z: z.relu()],
    ids=["masked", "shifted", "negated", "clamped", "cut", "relu"],
)
def test_attach_refuses_other_transforms_of_the_logits(model, change):
    changed = Changed(model.config)
    changed.change = change
    with pytest.raises(HeadError, match=r"attach_head: Changed: expected its logits to"):
        attach_head(changed)
    assert "forward" not in vars(changed)
    assert "forward" not in vars(changed.lm_head)


def test_check_head_refuses_a_model_that_changed_later(model, batch):
    changed = Changed(model.config)
    attach_head(changed)
    changed.change = lambda logits: logits * 1.5
    with pytest.raises(HeadError, match=r"Changed: expected log-probs .* difference <= .* got .*after the head"):
        check_head(changed, *batch)


def test_attach_refuses_a_head_that_is_not_plain(model):
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(HeadError, match=r"to have a linear output head .* got Sequential"):
        attach_head(model)


def test_attach_refuses_a_forward_that_is_patched(model):
    model.lm_head.forward = lambda hidden: hidden
    with pytest.raises(HeadError, match=r"forwards that are not patched, got a patched Linear.forward"):
        attach_head(model)
