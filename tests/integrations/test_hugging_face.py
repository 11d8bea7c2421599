"""Helpers of cwdpo_kernels.integrations.hugging_face that need no model of transformers."""

import pytest
import torch

from cwdpo_kernels.integrations.hugging_face import evaluating


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
