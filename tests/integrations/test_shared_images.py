"""Image features that policy and reference share: computed once, and only where the vision path is frozen."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from cwdpo_kernels import linear_logprob
from cwdpo_kernels.integrations import shared_images
from cwdpo_kernels.integrations.hugging_face import attach_head
from cwdpo_kernels.integrations.shared_images import ImageFeatures
from cwdpo_kernels.integrations.shared_prefix import enable_trees, token_tree, tree_batch

sys.path.append(str(Path(__file__).parents[1] / "trainer"))
import tiny_models

ANSWERS = [[[11, 12, 13], [14, 15, 16]], [[11, 20], [24]]]
VISION = [name for name in tiny_models.CLASSES if name not in ("llama", "gemma2", "cohere2", "qwen3")]


class Step:
    """A policy, its reference, a batch, and the number of times that images were encoded."""

    def __init__(self, name: str) -> None:
        self.policy, inputs = tiny_models.CLASSES[name]()
        attach_head(self.policy)
        self.reference = copy.deepcopy(self.policy)
        self.encoded = 0
        for model in (self.policy, self.reference):
            enable_trees(model)
            tower = next(
                m for n, m in model.named_modules() if n.split(".")[-1] in ("vision_tower", "visual", "vision_model")
            )
            tower.register_forward_hook(self.count)
        self.batch = tree_batch(self.policy, inputs, ANSWERS, {"token_type_ids": 1} if name == "paligemma" else {})

    def count(self, *_):
        self.encoded += 1

    def freeze(self) -> None:
        for name, parameter in self.policy.named_parameters():
            parameter.requires_grad_("language_model" in name or "text_model" in name)

    def logp(self, model):
        batch = self.batch
        with token_tree(batch.tree):
            return model(
                **batch.inputs, head_op=lambda hidden, head: linear_logprob(batch.packed(hidden), head, batch.labels)
            )

    def run(self, features):
        with features.once():
            with torch.no_grad():
                reference = self.logp(self.reference)
            return reference, self.logp(self.policy)


@pytest.mark.parametrize("name", VISION)
def test_frozen_features_are_computed_once(name):
    step = Step(name)
    step.freeze()
    with torch.no_grad():
        expected = step.logp(step.reference)
    features = ImageFeatures(step.policy, step.reference)
    step.run(features)  # it sees that the features need no gradient
    assert features.is_shared
    step.encoded = 0
    reference, policy = step.run(features)
    assert step.encoded == 1
    torch.testing.assert_close(reference, expected, atol=0, rtol=0)
    torch.testing.assert_close(policy, expected, atol=0, rtol=0)
    policy.sum().backward()
    assert any(p.grad is not None for p in step.policy.parameters())
    assert step.run(features)[1].requires_grad  # nothing of the step before is left
    assert step.encoded == 2


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_features_that_train_are_not_shared(name):
    step = Step(name)
    features = ImageFeatures(step.policy, step.reference)
    for _ in range(2):
        step.encoded = 0
        _, policy = step.run(features)
        assert step.encoded == 2
    assert not features.is_shared
    policy.sum().backward()
    assert any(p.grad is not None for n, p in step.policy.named_parameters() if "vision" in n or "visual" in n)


def test_other_images_are_encoded_again():
    step = Step("llava")
    step.freeze()
    features = ImageFeatures(step.policy, step.reference)
    step.run(features)
    step.encoded = 0
    with features.once():
        first = step.logp(step.policy)
        step.batch.inputs["pixel_values"] = torch.rand_like(step.batch.inputs["pixel_values"])
        second = step.logp(step.policy)
    assert step.encoded == 2
    assert not torch.equal(first, second)


def test_lists_of_tensors_are_told_apart():
    """A text of large tensors leaves out most of their entries."""
    first, second = torch.zeros(2, 5000), torch.zeros(2, 5000)
    assert repr(first) == repr(second)
    assert shared_images._key(([first],), {}) != shared_images._key(([second],), {})
    assert shared_images._key(([first],), {"grid": (1, 2)}) == shared_images._key(([first],), {"grid": (1, 2)})


def test_dropout_and_copies():
    step = Step("llava")
    step.policy.config.vision_config.attention_dropout = 0.1
    step.freeze()
    features = ImageFeatures(step.policy, step.reference)
    step.run(features)
    assert not features.is_shared
    other = Step("llava")
    ImageFeatures(other.policy)
    copied = copy.deepcopy(other.policy)
    assert copied.model.get_image_features.__self__ is copied.model


@pytest.mark.parametrize("name", VISION)
def test_generation_is_unchanged(name):
    """`generate` reads the signature of get_image_features, and passes only what it finds there."""
    model, inputs = tiny_models.CLASSES[name]()
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**inputs, **options)
    ImageFeatures(model)
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch.equal(copy.deepcopy(model).generate(**inputs, **options), expected)


def test_models_without_images():
    model, _ = tiny_models.llama()
    with ImageFeatures(model).once():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
