"""The stages on the tiny model: losses, the reference, logs and batches."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard

from cwdpo_trainer.data.collator import with_answers
from cwdpo_trainer.data.lengths import LengthMeter
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.stages.dpo import CWDPOTrainer
from cwdpo_trainer.stages.grouping import GroupedByLength
from cwdpo_trainer.stages.sft import ConstrainedSFTTrainer


def answer_logp(model, batch):
    """Summed log-probs and lengths of the answers, from full logits."""
    logits = model(**batch.inputs).logits.double()
    mask = batch.labels >= 0
    logp = logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logp * mask).sum(-1), mask.sum(-1)


def test_sft_loss_agrees_with_full_logits(make_stage, collator, rows):
    trainer = make_stage(ConstrainedSFTTrainer, negatives_weight=0.5, nll_floor=6.0)
    pairs = collator(rows[:4])
    batch = with_answers(pairs["prompts"], pairs["chosen"], pairs["rejected"], pad_id=0)
    total, count = answer_logp(trainer.model, batch)
    nll = -total / count
    expected = nll[:4].mean() + 0.5 * F.relu(6.0 - nll[4:].mean())
    assert trainer.compute_loss(trainer.model, pairs).item() == pytest.approx(expected.item(), rel=1e-5)


def test_cwdpo_loss_agrees_with_full_logits(make_stage, collator, rows):
    trainer = make_stage(CWDPOTrainer, beta=0.3, logp_floor=-4.0, tau=0.5, drop_below=None)
    trainer._is_first_batch = False
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(0.5 * torch.randn_like(trainer.model.lm_head.weight))
    pairs = collator(rows[:4])
    batch = with_answers(pairs["prompts"], pairs["chosen"], pairs["rejected"], pad_id=0)
    (total, count), (ref, _) = (answer_logp(model, batch) for model in (trainer.model, trainer.reference))
    ratio = total - ref
    weight = torch.sigmoid((total[4:] / count[4:] + 4.0) / 0.5).detach()
    expected = -F.logsigmoid(0.3 * (ratio[:4] - weight * ratio[4:])).mean()
    assert trainer.compute_loss(trainer.model, pairs).item() == pytest.approx(expected.item(), rel=1e-5)


def test_filtering_leaves_out_pairs_by_the_measured_threshold(make_stage):
    """drop_below: auto is logp_floor - ln(19) tau, whatever measures the two, and in every cooling mode."""
    for options in ({}, {"cooling": "constant", "constant_weight": 0.4}):
        trainer = make_stage(CWDPOTrainer, max_steps=2, logp_floor="auto", tau="auto", auto_rows=12, **options)
        trainer.train()
        logged = next(entry for entry in trainer.state.log_history if "drop_below" in entry)
        expected = logged["logp_floor"] - math.log(19) * logged["tau"]
        assert logged["drop_below"] == trainer.cooling.drop_below == pytest.approx(expected)


def test_stage_1_with_a_hard_constraint(make_stage, collator, rows):
    """While the rejected answers are too likely, the loss is their shortfall; then it is the NLL of the chosen ones."""
    for floor, term in ((50.0, "rejected"), (0.1, "chosen")):
        trainer = make_stage(ConstrainedSFTTrainer, negatives="hard", nll_floor=floor)
        trainer._is_first_batch = False
        loss, output = trainer.compute_loss(trainer.model, collator(rows[:4]), return_outputs=True)
        expected = floor - output.rejected_nll if term == "rejected" else output.chosen_nll
        assert loss.item() == pytest.approx(expected.item())


def test_cooling_off_is_vanilla_dpo(make_stage, collator, rows):
    trainer = make_stage(CWDPOTrainer, beta=0.3, cooling=False, drop_below=None)
    trainer._is_first_batch = False
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(0.5 * torch.randn_like(trainer.model.lm_head.weight))
    pairs = collator(rows[:4])
    batch = with_answers(pairs["prompts"], pairs["chosen"], pairs["rejected"], pad_id=0)
    ratio = answer_logp(trainer.model, batch)[0] - answer_logp(trainer.reference, batch)[0]
    expected = -F.logsigmoid(0.3 * (ratio[:4] - ratio[4:])).mean()
    assert trainer.compute_loss(trainer.model, pairs).item() == pytest.approx(expected.item(), rel=1e-5)


def counted_reference(trainer):
    """A list that gets the batch size of each forward of the reference."""
    sizes, forward = [], trainer.reference.forward

    @functools.wraps(forward)  # `generate` reads the signature
    def counting(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    trainer.reference.forward = counting
    return sizes


def losses(trainer, collator, rows):
    trainer._is_first_batch = False
    return [trainer.compute_loss(trainer.model, collator(rows[start : start + 4])).item() for start in (0, 4, 2)]


@pytest.mark.parametrize("fraction", [0.0, 0.4])
def test_the_reference_cache_saves_forwards_and_changes_no_loss(make_stage, collator, rows, tmp_path, fraction):
    """The third batch consists of rows of the first two."""
    options = {"onpolicy_fraction": fraction, "reference_cache": str(tmp_path / "cache"), "seed": 2}
    plain, filling, filled = (
        make_stage(CWDPOTrainer, **{**options, **more}) for more in ({"reference_cache": None}, {}, {})
    )
    for trainer in (plain, filling, filled):
        trainer.model = plain.model
    with torch.no_grad():
        plain.model.lm_head.weight.add_(0.5 * torch.randn_like(plain.model.lm_head.weight))
    expected = losses(plain, collator, rows)
    sizes = counted_reference(filling)
    assert losses(filling, collator, rows) == pytest.approx(expected, rel=1e-6)
    drawn = [round(4 * value.item()) for value in filling._recorded["onpolicy"]]
    assert (sum(drawn) > 0) == (fraction > 0)
    forwards = [[8, drawn[0]], [8, drawn[1]], [drawn[2]]]
    assert sizes == [size for batch in forwards for size in batch if size > 0]
    sizes = counted_reference(filled)
    assert losses(filled, collator, rows) == losses(filling, collator, rows)
    assert sizes == [size for size in drawn if size > 0]


def test_training_on_a_filled_cache_runs_the_reference_for_probes_only(make_stage):
    first = make_stage(CWDPOTrainer, max_steps=4, eval_strategy="no", eval_on_start=False)
    computed = counted_reference(first)
    first.train()
    probes = len(computed) - 4  # each of the four batches is computed once, the check of the first one included
    first.model.load_state_dict(first.reference.state_dict())
    again = make_stage(CWDPOTrainer, max_steps=4, eval_strategy="no", eval_on_start=False)
    computed = counted_reference(again)
    again.train()
    assert len(computed) == probes


def test_wrong_cached_values_are_refused(make_stage):
    trainer = make_stage(CWDPOTrainer)
    trainer._reference_logp = lambda batch: torch.zeros(len(batch.labels))
    trainer.cached_reference._forward = trainer._reference_logp
    with pytest.raises(RuntimeError, match=r"handover: expected log-ratios"):
        trainer.train()


def test_all_ranks_run_a_forward_if_one_must(make_stage, collator, rows, monkeypatch):
    """Because forwards of a sharded model are collective."""
    trainer = make_stage(CWDPOTrainer)
    losses(trainer, collator, rows)
    sizes = counted_reference(trainer)
    before = losses(trainer, collator, rows)
    assert sizes == []
    monkeypatch.setattr("cwdpo_trainer.stages.reference.largest", lambda accelerator, number: max(number, 1))
    assert losses(trainer, collator, rows) == before
    assert sizes == [2, 1] * 3
    assert len(trainer.cached_reference.cache) == 8


def test_automatic_cooling_is_measured_once(make_stage, rows, tmp_path, monkeypatch):
    options = {"logp_floor": "auto", "tau": "auto", "auto_rows": 10, "save_strategy": "steps", "save_steps": 2}
    trainer = make_stage(CWDPOTrainer, **options)
    trainer.train()
    batch = trainer._dataset_batch(trainer._collate(rows[:10]))
    total, count = answer_logp(trainer.reference, batch)
    low, floor, high = torch.quantile((total / count)[10:], torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    measured = {"logp_floor": trainer.cooling.logp_floor, "tau": trainer.cooling.temperature}
    assert measured == pytest.approx({"logp_floor": floor, "tau": (high - low) / (2 * math.log(3))}, rel=1e-5)
    (logged,) = [entry for entry in trainer.state.log_history if "logp_floor" in entry]
    assert logged.items() >= measured.items()
    assert trainer.probes.cooling == trainer.cooling

    monkeypatch.setattr(CWDPOTrainer, "_measure_cooling", None)  # a resumed run must not measure again
    resumed = make_stage(CWDPOTrainer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stage" / "checkpoint-2"))
    assert resumed.cooling == trainer.cooling
    assert resumed.state.global_step == 4


def test_training_changes_the_policy_and_not_the_reference(make_stage):
    trainer = make_stage(CWDPOTrainer, learning_rate=1e-3, onpolicy_fraction=0.5)
    before = copy.deepcopy(trainer.reference.state_dict())
    trainer.train()
    for name, value in trainer.reference.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(trainer.model.lm_head.weight, before["lm_head.weight"])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {
        "margin",
        "accuracy",
        "cooling_weight",
        "chosen_mean_logp",
        "rejected_mean_logp",
        "kept",
        "onpolicy",
        "onpolicy_fraction",
    }
    assert [entry["step"] for entry in logs] == [2, 4]
    assert all(names <= entry.keys() for entry in logs)
    assert logs[0]["kept"] == 1
    assert 0 < sum(entry["onpolicy"] for entry in logs) < 2
    probes = [entry for entry in trainer.state.log_history if "eval_chosen_logp" in entry]
    assert [entry["step"] for entry in probes] == [0, 2, 4]
    assert probes[0]["eval_chosen_delta_logp"] == 0
    assert probes[-1]["eval_chosen_delta_logp"] != 0


def test_a_reference_that_is_not_the_initial_policy_is_refused(make_stage):
    def tamper(reference):
        with torch.no_grad():
            reference.lm_head.weight[7] *= 1.01

    trainer = make_stage(CWDPOTrainer, tamper=tamper)
    with pytest.raises(RuntimeError, match=r"handover: expected log-ratios .* <= .* nats, got .*mean"):
        trainer.train()


def test_the_card_of_a_stage_trained_without_a_run(make_stage, tmp_path):
    trainer = make_stage(CWDPOTrainer, beta=0.3, hub_token="hf_secret")
    with pytest.raises(InputError, match=r"expected probes of a trained stage for its card, got none"):
        trainer.create_model_card()
    trainer.train()
    trainer.create_model_card("squares")
    card = ModelCard.load(tmp_path / "stage" / "README.md")
    (logp,) = (result.metric_value for result in card.data.eval_results if result.metric_type == "chosen_logp")
    probes = [entry for entry in trainer.state.log_history if "eval_chosen_logp" in entry]
    assert logp == probes[-1]["eval_chosen_logp"]
    assert "beta: 0.3" in card.text
    assert "tau" not in card.text
    assert "secret" not in card.content


def test_dropped_pairs_are_counted(make_stage):
    trainer = make_stage(CWDPOTrainer, drop_below=0.0)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["kept"] for entry in logs] == [0, 0]
    assert "margin" not in logs[0]
    assert [entry["loss"] for entry in logs] == [0, 0]


@pytest.mark.parametrize("kind", [ConstrainedSFTTrainer, CWDPOTrainer])
def test_batches_of_similar_length(make_stage, collator, rows, kind):
    trainer = make_stage(kind, train_sampling_strategy="group_by_length", gradient_accumulation_steps=2, max_steps=1)
    trainer.rows[:] = [dataclasses.replace(row, chosen="a " * (index % 9 + 1)) for index, row in enumerate(rows)]
    length = dict(zip((row.id for row in trainer.rows), map(LengthMeter(collator), trainer.rows), strict=True))
    batches = list(trainer.get_train_dataloader())
    assert sorted(row for batch in batches for row in batch["rows"]) == sorted(length)
    spreads = [np.ptp([length[row].total for row in batch["rows"]]) for batch in batches]
    everything = np.ptp([one.total for one in length.values()])
    assert np.mean(spreads) < 0.4 * everything
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_order_by_length_depends_on_seed_and_epoch_alone(collator, rows):
    first, resumed = (GroupedByLength(rows, collator, 4, seed=1) for _ in range(2))
    orders = []
    for epoch in (0, 1):
        first.set_epoch(epoch)
        orders.append(list(first))
    resumed.set_epoch(1)
    assert list(resumed) == orders[1] != orders[0]
    assert list(GroupedByLength(rows, collator, 4, seed=2)) != orders[0]
