"""How stages end on the tiny model: early stopping, divergence, and the best checkpoint."""

from __future__ import annotations

import math

import pytest
import torch

from cwdpo_trainer.config.stage_arguments import DPOArguments, SFTArguments
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.stages.dpo import CWDPOTrainer
from cwdpo_trainer.stages.sft import ConstrainedSFTTrainer


def test_the_last_probe_measures_the_final_weights(make_stage):
    trainer = make_stage(ConstrainedSFTTrainer, max_steps=3)
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_chosen_logp" in entry]
    assert steps == [0, 2, 3]


def test_early_stopping_on_a_probe(make_stage):
    trainer = make_stage(
        ConstrainedSFTTrainer, max_steps=20, eval_steps=1, learning_rate=0.0, early_stopping_patience=2,
        metric_for_best_model="chosen_mean_logp", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    # At learning rate 0 no probe is better than the first. The second and third use up the patience.
    assert trainer.state.global_step == 3


def test_early_stopping_keeps_its_count_on_resume(make_stage, tmp_path):
    options = {
        "max_steps": 20, "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.0,
        "save_total_limit": None, "early_stopping_patience": 4, "metric_for_best_model": "chosen_mean_logp",
    }  # fmt: skip
    make_stage(ConstrainedSFTTrainer, **options).train()
    resumed = make_stage(ConstrainedSFTTrainer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stage" / "checkpoint-3"))
    assert resumed.state.global_step == 5


@pytest.mark.parametrize(("metric", "is_greater"), [("chosen_logp", True), ("near_tv", False), ("chosen_ece", False)])
def test_greater_is_better_depends_on_the_metric(metric, is_greater, tmp_path):
    assert SFTArguments(output_dir=str(tmp_path), metric_for_best_model=metric).greater_is_better == is_greater
    assert DPOArguments(
        output_dir=str(tmp_path), metric_for_best_model=metric, greater_is_better=not is_greater
    ).greater_is_better != is_greater  # fmt: skip


def test_older_checkpoints_are_deleted_once_a_newer_one_is_complete(make_stage, tmp_path, monkeypatch):
    """`save_total_limit` is kept, and the best checkpoint counts toward it."""
    complete = []

    def save_stage_files(self, folder):
        complete.append(sorted(path.parent.name for path in tmp_path.glob("stage/*/COMPLETE")))

    monkeypatch.setattr(ConstrainedSFTTrainer, "_save_stage_files", save_stage_files)
    make_stage(
        ConstrainedSFTTrainer, max_steps=4, eval_steps=1, save_steps=1, save_strategy="steps", learning_rate=0.0,
        load_best_model_at_end=True, metric_for_best_model="chosen_logp", save_total_limit=2,
    ).train()  # fmt: skip
    first = "checkpoint-1"  # the best
    assert complete == [[], [first], [first, "checkpoint-2"], [first, "checkpoint-3"]]
    assert sorted(path.name for path in tmp_path.glob("stage/checkpoint-*")) == [first, "checkpoint-4"]


@pytest.mark.parametrize("kind", [ConstrainedSFTTrainer, CWDPOTrainer])
def test_a_stage_that_diverges_stops_and_names_the_step(kind, make_stage, tmp_path):
    """The first step moves the weights by 1e36, and the second one cannot compute its loss."""
    trainer = make_stage(kind, learning_rate=1e36, eval_strategy="no", lr_scheduler_type="constant")
    name = "dpo" if kind is CWDPOTrainer else "sft"
    with pytest.raises(InputError, match=rf"stage {name}, step 2, learning_rate 1e\+36: loss: .* got nan"):
        trainer.train()


def test_a_filter_of_pairs_does_not_hide_that_a_stage_diverged(make_stage):
    trainer = make_stage(CWDPOTrainer, learning_rate=1e36, lr_scheduler_type="constant", drop_below=-8.0)
    with pytest.raises(InputError, match=r"stage dpo, step 2, .*: expected a finite number .* got nan"):
        trainer.train()


def test_weights_that_are_not_finite_are_not_saved(make_stage, tmp_path):
    """The loss and gradients of the step that broke them are finite, and no later step shows it."""
    trainer = make_stage(
        ConstrainedSFTTrainer, learning_rate=1e39, max_steps=1, eval_strategy="no", save_strategy="steps", save_steps=1
    )
    with pytest.raises(InputError, match=r"step 1, .*: weights: expected finite numbers .* got NaN or infinity in "):
        trainer.train()
    assert not list(tmp_path.glob("stage/checkpoint-*"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_do_not_reach_the_weights(value, make_stage):
    trainer = make_stage(ConstrainedSFTTrainer, eval_strategy="no")
    weight = trainer.model.lm_head.weight
    before = weight.detach().clone()
    weight.register_hook(lambda grad: torch.full_like(grad, value))
    with pytest.raises(InputError, match=f"stage sft, step 1, .*: norm of the gradients: .*got {value}"):
        trainer.train()
    assert torch.equal(weight, before)


def test_a_diverged_model_is_not_sampled_from(make_stage):
    """torch's own error about probabilities would not say why."""
    trainer = make_stage(CWDPOTrainer, learning_rate=1e39, lr_scheduler_type="constant", eval_strategy="no",
                   onpolicy_fraction=1.0)  # fmt: skip
    with pytest.raises(InputError, match=r"stage dpo, step 1, .*: weights"):
        trainer.train()


def test_the_best_checkpoint_is_found_in_a_folder_that_has_moved(make_stage, tmp_path, monkeypatch):
    options = {
        "max_steps": 4, "eval_steps": 1, "save_steps": 1, "save_strategy": "steps", "learning_rate": 0.0,
        "load_best_model_at_end": True, "metric_for_best_model": "chosen_logp",
    }  # fmt: skip
    make_stage(ConstrainedSFTTrainer, **options, output_dir=str(tmp_path / "before")).train()
    (tmp_path / "before").rename(tmp_path / "stage")
    best, last = (str(tmp_path / "stage" / f"checkpoint-{step}") for step in (1, 4))
    loaded = []
    monkeypatch.setattr("cwdpo_trainer.stages.base.load_weights", lambda model, folder: loaded.append(folder))
    resumed = make_stage(ConstrainedSFTTrainer, **options)
    resumed.train(resume_from_checkpoint=last)
    assert loaded == [last, best]
    assert resumed.state.best_model_checkpoint == best
    (tmp_path / "stage" / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"checkpoint-1/optimizer.pt: expected the .* bytes that were saved"):
        make_stage(ConstrainedSFTTrainer, **options).train(resume_from_checkpoint=last)


def test_a_finding_in_stop_on_ends_a_stage(make_stage, capsys):
    """With every pair dropped, the first probe after a training log shows nothing_kept."""
    trainer = make_stage(CWDPOTrainer, max_steps=20, drop_below=0.0, stop_on=["nothing_kept"])
    trainer.train()
    assert trainer.state.global_step == 2
    printed = capsys.readouterr().out
    assert printed.count("found nothing_kept (stage dpo, step 2): drop_below = 0.0 leaves 0.0% of the pairs") == 1
    assert "stage dpo stops at step 2, because stop_on names nothing_kept" in printed


@pytest.mark.parametrize(("kind", "name"), [(DPOArguments, "squezing"), (SFTArguments, "squeezing")])
def test_unknown_findings_are_refused(kind, name, tmp_path):
    with pytest.raises(ValueError, match=f"stop_on: expected names of findings out of not_finite, .*got '{name}'"):
        kind(output_dir=str(tmp_path), stop_on=[name])


def test_the_best_weights_are_loaded_at_the_end(make_stage, tmp_path):
    trainer = make_stage(
        ConstrainedSFTTrainer, max_steps=8, eval_steps=2, save_steps=2, save_strategy="steps",
        learning_rate=1e-3,
        load_best_model_at_end=True, metric_for_best_model="near_mean_logp", greater_is_better=True,
        save_total_limit=8, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    probes = [entry for entry in trainer.state.log_history if "eval_near_mean_logp" in entry]
    best = max(probes[1:-1], key=lambda entry: entry["eval_near_mean_logp"])
    assert trainer.state.best_global_step == best["step"]
    stored = type(trainer.model).from_pretrained(tmp_path / "stage" / f"checkpoint-{best['step']}")
    for name, value in stored.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    assert probes[-1]["eval_near_mean_logp"] == best["eval_near_mean_logp"]


def test_unknown_metrics_are_refused_before_training(make_stage):
    with pytest.raises(InputError, match=r"metric_for_best_model: expected a probe metric .*chosen_logp"):
        make_stage(
            ConstrainedSFTTrainer, early_stopping_patience=2, metric_for_best_model="chosen_lopg",
            greater_is_better=True,
        ).train()  # fmt: skip
