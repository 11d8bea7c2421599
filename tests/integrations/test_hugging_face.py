"""cwdpo_kernels.integrations.hugging_face on models of a few parameters."""

import pytest
import torch

from cwdpo_kernels.integrations.hugging_face import HeadError, attach_head, evaluating


def model_of_mixed_modes():
    """A training model with a module frozen in evaluation mode."""
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.BatchNorm1d(3))).train()
    model[1][0].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_evaluating_restores_every_module():
    model = model_of_mixed_modes()
    with evaluating(model):
        assert not any(modes(model))
        model.train()  # whatever happens inside
    assert modes(model) == modes(model_of_mixed_modes())


def test_evaluating_restores_after_an_error():
    model = model_of_mixed_modes()
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert modes(model) == modes(model_of_mixed_modes())


def tiny_llama(bias):
    """A causal language model whose head has the given bias."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(bias), **sizes))
    model.lm_head = torch.nn.Linear(16, len(bias))
    model.lm_head.bias.data = bias
    return model


@pytest.mark.parametrize("first", [0, 8, 90])
def test_masked_vocabulary_columns_are_accepted(first):
    """A padded vocabulary, and one in which the labels that attach_head draws are masked, too."""
    bias = torch.zeros(101)
    bias[first:] = -torch.inf
    bias[100] = 0.0
    assert attach_head(tiny_llama(bias)).difference < 1e-4


def test_broken_heads_are_refused_for_what_they_are():
    bias = torch.zeros(101)
    bias[3] = torch.nan
    with pytest.raises(HeadError, match="expected logits to have values finite or -inf, got NaN or"):
        attach_head(tiny_llama(bias))
