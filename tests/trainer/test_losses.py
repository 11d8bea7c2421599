"""`dpo.loss`: stage 2 with other preference losses, with and without a reference."""

from __future__ import annotations

import json
import re

import mpmath as mp
import pytest
import torch
from huggingface_hub import ModelCard
from preference.definitions import TABLE, Pair

import cwdpo_kernels as ck
from cwdpo_trainer.cli import main
from cwdpo_trainer.config.loader import load_config, read_config
from cwdpo_trainer.data.collator import with_answers
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.evaluation.doctor import diagnose
from cwdpo_trainer.preflight.run_rules import RunPreview, beta
from cwdpo_trainer.stages.dpo import CWDPOTrainer

ROWS = [row for row in TABLE if row.loss.name != "cwdpo"]
QUIET = {"eval_strategy": "no", "eval_on_start": False}


def total_logp(model, batch):
    """Summed log-probs and lengths of the answers, from full logits."""
    logp = model(**batch.inputs).logits.double().log_softmax(-1)
    mask = batch.labels >= 0
    return (logp.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0] * mask).sum(-1), mask.sum(-1)


def count_reference(trainer, monkeypatch):
    """A list that gets an entry for each forward of the reference."""
    calls, run = [], trainer.reference.forward
    monkeypatch.setattr(trainer.reference, "forward", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    return calls


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_loss_agrees_with_its_definition(make_stage, collator, rows, monkeypatch, row):
    options = {key: value for key, value in vars(row.loss).items() if key != "beta"}
    trainer = make_stage(CWDPOTrainer, loss=row.loss.name, loss_options=options, beta=row.loss.beta)
    assert trainer.args.preference_loss(None) == row.loss
    trainer._is_first_batch = False
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(0.5 * torch.randn_like(trainer.model.lm_head.weight))
    pairs = collator(rows[:4])
    batch = with_answers(pairs["prompts"], pairs["chosen"], pairs["rejected"], pad_id=0)
    with torch.no_grad():
        (total, count), (ref, _) = (total_logp(model, batch) for model in (trainer.model, trainer.reference))
    calls = count_reference(trainer, monkeypatch)
    loss, output = trainer.compute_loss(trainer.model, pairs, return_outputs=True)
    columns = [x.tolist() for x in (total, count, ref)]
    by_hand = [Pair(*(x for column in columns for x in column[i::4])) for i in range(4)]
    expected = sum(row.definition(Pair(*map(mp.mpf, pair)), row.loss) for pair in by_hand) / 4
    assert loss.item() == pytest.approx(float(expected), rel=1e-4)
    assert len(calls) == (1 if row.loss.needs_reference else 0)
    assert set(trainer._metrics(output)) == {
        "margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_mean_logp", "rejected_mean_logp", "kept",
    }  # fmt: skip


def test_normalize_overrides_the_unit_of_the_loss(make_stage, collator, rows):
    assert make_stage(CWDPOTrainer, loss="ipo").args.normalization == "token"
    assert make_stage(CWDPOTrainer).args.normalization == "sequence"
    found = []
    for normalize in (None, "token", "sequence"):
        trainer = make_stage(CWDPOTrainer, loss="ipo", normalize=normalize)
        trainer._is_first_batch = False
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1.1)
        found.append(trainer.compute_loss(trainer.model, collator(rows[:4])).item())
        with torch.no_grad():
            trainer.model.lm_head.weight.div_(1.1)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != pytest.approx(found[2], rel=1e-2)


def test_a_loss_without_a_reference_runs_it_for_probes_only(make_stage, monkeypatch, tmp_path):
    trainer = make_stage(CWDPOTrainer, loss="simpo", beta=2.0, **QUIET)
    assert trainer.cached_reference is None
    trainer.probes.draw_onpolicy = lambda reference: None
    monkeypatch.setattr(trainer, "evaluate", dict)
    calls = count_reference(trainer, monkeypatch)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert not calls
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"margin", "accuracy", "kept"} <= logged
    assert not logged & {"cooling_weight", "logp_floor", "tau", "drop_below"}
    assert not (tmp_path / "stage" / "reference_cache").exists()


def test_a_stage_with_another_loss_resumes_exactly(make_stage, tmp_path, model):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"loss": "orpo", "save_strategy": "steps", "save_steps": 2, "curriculum": "hardest_first", **QUIET}
    whole = make_stage(CWDPOTrainer, **options)
    whole.train()
    end = {name: value.clone() for name, value in whole.model.state_dict().items()}
    checkpoint = tmp_path / "stage" / "checkpoint-2"
    assert not (checkpoint / "cooling.json").exists()
    model.load_state_dict(start)
    resumed = make_stage(CWDPOTrainer, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.order == whole.order
    assert all(torch.equal(value, end[name]) for name, value in resumed.model.state_dict().items())


def test_a_run(settings, write_config, tmp_path, capsys):
    del settings["sft"]
    settings["dpo"] |= {"loss": "simpo", "beta": 2.0, "loss_options": {"gamma": "5e-1"}, "onpolicy_fraction": 0.0}
    assert main(["run", str(write_config(settings))]) == 0
    folder = tmp_path / "run"
    assert not (folder / "cwdpo" / "cooling.json").exists()
    card = ModelCard.load(folder / "cwdpo" / "README.md")
    assert "with the preference loss `simpo`, using cwdpo_kernels" in " ".join(card.text.split())
    assert "gamma: 5e-1" in card.text
    metrics = json.loads((folder / "metrics.json").read_text())
    assert "near_logp" in metrics["after_cwdpo"]["probes"]
    assert "near_cooling" not in metrics["after_cwdpo"]["probes"]
    assert main(["probe", str(folder), str(settings["data"]["heldout"])]) == 0


def test_check_shows_the_loss_and_filters_nothing(case, capsys):
    case.settings["dpo"] |= {"loss": "simpo", "beta": 2, "loss_options": {"gamma": "1e-1"}}
    assert main(["check", str(case.save())]) == 0
    out = capsys.readouterr().out
    line = "loss of stage dpo: simpo (beta 2, gamma 0.1, label_smoothing 0, means of log-probs, no reference)"
    assert f"\n{line}\n" in out
    assert "negative filtering" not in out
    assert "time of a step of stage dpo: " in out
    assert out.endswith("\n0 errors, 0 warnings\n")


def test_check_warns_of_a_beta_that_the_loss_does_not_take(settings, write_config):
    settings["dpo"] |= {"loss": "simpo"}
    config = load_config(write_config(settings))
    evidence, advice = beta(RunPreview(config))
    assert evidence == "dpo.beta is 0.1, not in [1, 20] (dpo.loss: simpo, on means of log-probs)"
    assert advice == "the usual value is 2"


def test_descriptions_of_losses(settings, write_config):
    path = write_config(settings)
    shown = load_config(path).dpo.describe_loss()
    assert shown == "loss of stage dpo: cwdpo (beta 0.1, cooling adaptive, sums of log-probs)"
    shown = load_config(path, ["dpo.loss=robust"]).dpo.describe_loss()
    assert shown == "loss of stage dpo: robust (beta 0.1, label_smoothing 0.1, sums of log-probs)"


NAMES = ", ".join(ck.PREFERENCE_LOSSES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dpo.loss=simpoo"], rf"dpo.loss: expected one of {NAMES} \(did you mean 'simpo'\?\), got 'simpoo'"),
        (["dpo.loss=off"], "dpo.loss: expected type str, got False"),
        (["dpo.loss_options.gamma=1"], r"loss_options: expected options of loss cwdpo \(it has none\), got 'gamma'"),
        (
            ["dpo.loss=simpo", "dpo.loss_options.gama=1"],
            r"options of loss simpo \(gamma, label_smoothing\) \(did you mean 'gamma'\?\), got 'gama'",
        ),
        (["dpo.loss=simpo", "dpo.loss_options.beta=1"], "loss_options: expected options of loss simpo .*, got 'beta'"),
        (
            ["dpo.loss=simpo", "dpo.loss_options.gamma=-1"],
            "dpo.loss_options: expected gamma to have value finite and >= 0, got -1",
        ),
        (
            ["dpo.loss=exo_pair", "dpo.loss_options.label_smoothing=high"],
            "dpo.loss_options: expected label_smoothing to have type a number, got 'high'",
        ),
        (["dpo.loss=hinge", "dpo.loss_options=3"], "dpo.loss_options: expected type dict, got 3"),
        (["dpo.loss=dpo"], r"dpo.loss: expected one of .* \(did you mean '.*'\?\), got 'dpo'"),
        (
            ["dpo.loss=simpo", "dpo.tau=0.5"],
            "dpo.tau: expected its default 1.0, as loss simpo has no cooling weight, got 0.5",
        ),
        (["dpo.loss=sigmoid", "dpo.logp_floor=auto"], "dpo.logp_floor: expected its default -3.0, .*, got 'auto'"),
        (["dpo.loss=sigmoid", "dpo.cooling=off"], "dpo.cooling: expected its default adaptive, .*, got 'off'"),
        (["dpo.loss=sigmoid", "dpo.drop_below=-9"], "dpo.drop_below: expected its default auto, .*, got -9.0"),
        (["dpo.loss=sigmoid", "preset=constant_weight"], "dpo.cooling: expected its default adaptive"),
        (
            ["dpo.loss=simpo", "dpo.reference_cache=here"],
            "dpo.reference_cache: expected its default or null, as loss simpo has no reference, got 'here'",
        ),
        (["dpo.loss=simpo", "dpo.normalize=words"], "dpo.normalize: expected sequence or token, got 'words'"),
    ],
)  # fmt: skip
def test_mistakes_in_the_config(settings, write_config, overrides, message):
    path = write_config(settings)
    _, errors = read_config(path, overrides)
    assert any(re.search(message, str(error)) for error in errors), errors
    with pytest.raises(InputError):
        load_config(path, overrides)


def test_options_of_cooling_that_are_off_are_accepted(settings, write_config):
    overrides = ["dpo.loss=simpo", "dpo.drop_below=null", "dpo.reference_cache=null", "dpo.normalize=token"]
    config = load_config(write_config(settings), overrides)
    assert config.dpo.preference_loss(None) == ck.PREFERENCE_LOSSES["simpo"](beta=0.1)
    assert config.dpo.fixed_cooling is None
    assert not config.dpo.is_cooling_measured


def test_the_doctor_knows_the_loss():
    names = (
        "logp",
        "mean_logp",
        "delta_logp",
        "delta_mean_logp",
        "entropy",
        "top1_prob",
        "accuracy",
        "ece",
        "tv",
        "js",
    )
    probe = {f"eval_{answers}_{name}": 0.0 for answers in ("chosen", "near") for name in names}
    fallen = {"eval_chosen_delta_mean_logp": -0.5, "eval_chosen_delta_logp": -2.0, "eval_near_delta_logp": -9.0}
    later = {**probe, **fallen, "eval_chosen_top1_prob": 0.9, "eval_near_cooling": 0.5}
    history = [{"step": 0, **probe}, {"step": 2, "kept": 0.0, "loss": 1.0}, {"step": 2, **later}]
    found = {}
    for loss in ("cwdpo", "sigmoid"):
        diagnosed = diagnose("dpo", history, {"loss": loss}, {"chosen": 50, "near": 50})
        found[loss] = {finding.name: str(finding) for finding in diagnosed}
    assert {"squeezing", "nothing_kept"} <= found["cwdpo"].keys()
    assert "raise logp_floor" in found["cwdpo"]["squeezing"]
    assert "set loss: cwdpo" in found["sigmoid"]["squeezing"]
    assert "nothing_kept" not in found["sigmoid"]
