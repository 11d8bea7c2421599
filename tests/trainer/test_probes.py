"""Probes against metrics computed from full logits in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from cwdpo_kernels import Cooling
from cwdpo_kernels.integrations.hugging_face import attach_head
from cwdpo_trainer.config.arguments import ProbeArguments, SamplingArguments
from cwdpo_trainer.evaluation.probes import Probes

COOLING = Cooling(logp_floor=-4.0, temperature=0.7)


@pytest.fixture
def probes(collator, rows):
    return Probes(
        rows,
        collator,
        ProbeArguments(rows=10, batch_size=4),
        SamplingArguments(max_new_tokens=5),
        COOLING,
        seed=0,
    )


@pytest.fixture
def models(model):
    """A policy and a reference with other weights."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.lm_head.weight.add_(0.3 * torch.randn_like(reference.lm_head.weight))
        reference.base_model.language_model.norm.weight.mul_(0.8)
    attach_head(model)
    attach_head(reference)
    return model, reference.eval()


def log_softmax(model, collator, row, tokens):
    """Log-probs [len(tokens), V] of one answer, without padding."""
    prompt = collator.prompts([row])
    ids = torch.cat([prompt["input_ids"], torch.tensor([tokens])], dim=1)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=prompt["pixel_values"]).logits
    return logits[0, -len(tokens) - 1 : -1].double().log_softmax(-1)


def from_full_logits(models, collator, answers):
    logp, mean, ref_logp, entropy, top1, right, tv, js = ([] for _ in range(8))
    for row, tokens in answers:
        p, q = (log_softmax(model, collator, row, tokens) for model in models)
        indices = torch.arange(len(tokens)), torch.tensor(tokens)
        logp.append(p[indices].sum())
        mean.append(p[indices].mean())
        ref_logp.append(q[indices].sum())
        entropy.append(-(p.exp() * p).sum(-1))
        best = p.max(-1)
        top1.append(best.values.exp())
        right.append(best.indices == indices[1])
        tv.append((p.exp() - q.exp()).abs().sum(-1) / 2)
        middle = ((p.exp() + q.exp()) / 2).log()
        js.append(((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / 2)
    top1, right = torch.cat(top1), torch.cat(right).double()
    bins = (top1 * 15).long().clamp(max=14)
    gaps = [(right[bins == b].mean() - top1[bins == b].mean()).abs() * (bins == b).sum() for b in bins.unique()]
    average = {"logp": logp, "mean_logp": mean, "entropy": entropy, "tv": tv, "js": js}
    metrics = {name: torch.cat([value.flatten() for value in values]).mean() for name, values in average.items()}
    metrics |= {"top1_prob": top1.mean(), "accuracy": right.mean(), "ece": sum(gaps) / len(top1)}
    metrics["delta_logp"] = metrics["logp"] - torch.stack(ref_logp).mean()
    weights = torch.sigmoid((torch.stack(mean) - COOLING.logp_floor) / COOLING.temperature)
    return metrics | {"cooling": weights.mean()}, weights


def test_metrics_agree_with_full_logits(models, collator, probes):
    probes.draw_onpolicy(models[1])
    metrics = probes.measure(*models, torch.device("cpu"))
    assert list(metrics) == probes.names()
    assert set(probes.sets) == {"chosen", "near", "easy", "onpolicy"}
    for name, answers in probes.sets.items():
        expected, weights = from_full_logits(models, collator, answers)
        if name == "chosen":
            expected.pop("cooling")
            assert "chosen_cooling" not in metrics
        else:
            shares = [metrics[f"{name}_cooling_bin{index}"] for index in range(10)]
            expected_shares = [((weights * 10).long() == index).double().mean().item() for index in range(10)]
            assert shares == pytest.approx(expected_shares)
        for key, value in expected.items():
            assert metrics[f"{name}_{key}"] == pytest.approx(value.item(), rel=1e-4, abs=2e-5), (name, key)


def test_a_model_does_not_differ_from_itself(models, probes):
    metrics = probes.measure(models[0], models[0], torch.device("cpu"))
    for name in ("chosen", "near", "easy"):
        assert metrics[f"{name}_delta_logp"] == 0
        assert metrics[f"{name}_tv"] == pytest.approx(0, abs=1e-6)
        assert 0 < metrics[f"{name}_entropy"] < math.log(models[0].config.text_config.vocab_size)


def test_a_chosen_answer_counts_once_per_prompt(collator, rows):
    twice = [rows[0], type(rows[0])(**{**vars(rows[0]), "rejected": "the a", "negative_source": "near"})]
    probes = Probes(twice, collator, ProbeArguments(), SamplingArguments(), COOLING, seed=0)
    assert {name: len(answers) for name, answers in probes.sets.items()} == {
        "chosen": 1,
        "easy": 1,
        "near": 1,
    }


def test_measuring_restores_the_mode_of_every_module(models, probes):
    """Also of a module that is frozen in evaluation mode while the model trains."""
    models[0].train()
    models[0].base_model.vision_tower.eval()
    modes = [module.training for module in models[0].modules()]
    probes.measure(*models, torch.device("cpu"))
    assert [module.training for module in models[0].modules()] == modes
    assert all(parameter.grad is None for parameter in models[0].parameters())
