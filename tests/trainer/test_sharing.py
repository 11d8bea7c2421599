"""Prompts that are encoded once for all their answers: the same training, probes and scores as with separate ones."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import TrainingArguments

from cwdpo_kernels import Cooling
from cwdpo_kernels.integrations import shared_prefix
from cwdpo_kernels.integrations.hugging_face import attach_head
from cwdpo_kernels.integrations.shared_prefix import enable_trees
from cwdpo_trainer.cli import main
from cwdpo_trainer.config.arguments import ProbeArguments, SamplingArguments
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.files import read_json
from cwdpo_trainer.models.forward_checks import choose_sharing
from cwdpo_trainer.negatives.policy import answers_logp
from cwdpo_trainer.run_folder import STATE_FILE, RunFolder
from cwdpo_trainer.stages.dpo import CWDPOTrainer
from cwdpo_trainer.stages.sft import ConstrainedSFTTrainer

CPU = torch.device("cpu")
# transformers 5.23 renamed it
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


def trained(make_stage, model, kind, sharing, **options):
    """The losses of 20 steps, the last probe and the trained weights. `model` is reset afterwards."""
    start = copy.deepcopy(model.state_dict())
    trainer = make_stage(
        kind, prefix_sharing=sharing, max_steps=20, logging_steps=1, eval_steps=10, eval_strategy="steps",
        learning_rate=1e-3, **options,
    )  # fmt: skip
    assert trainer.sharing.is_shared == (sharing == "on"), trainer.sharing
    trainer.train()
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    probe = [entry for entry in log if "eval_chosen_logp" in entry][-1]
    weights = copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    return torch.tensor(losses), {key: probe[key] for key in probe if key.startswith("eval_")}, weights


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        (ConstrainedSFTTrainer, False),
        pytest.param(ConstrainedSFTTrainer, True, marks=pytest.mark.slow),
        pytest.param(CWDPOTrainer, False, marks=pytest.mark.slow),
        (CWDPOTrainer, True),
    ],
)
def test_trajectories_are_equal(make_stage, model, kind, checkpointing):
    options = {CHECKPOINTING: checkpointing, "gradient_accumulation_steps": 2}
    if kind is CWDPOTrainer:
        options |= {"onpolicy_fraction": 0.5, "refresh_steps": 3, "logp_floor": "auto", "tau": "auto"}
    (losses, probe, weights), (shared_losses, shared_probe, shared_weights) = (
        trained(make_stage, model, kind, sharing, **options) for sharing in ("off", "on")
    )
    assert len(losses) == 20
    torch.testing.assert_close(shared_losses, losses, atol=2e-5, rtol=1e-4)
    assert shared_probe == pytest.approx(probe, abs=2e-4, rel=1e-3, nan_ok=True)
    for name, value in weights.items():
        torch.testing.assert_close(shared_weights[name], value, atol=1e-4, rtol=1e-4)


def test_trajectories_with_lora_and_a_reference_cache(case, capsys):
    """Two whole runs, whose losses agree."""
    case.settings["lora"] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    case.settings["dpo"]["reference_cache"] = "cache"
    losses = {}
    for sharing in ("off", "on"):
        case.settings["model"]["prefix_sharing"] = sharing
        case.settings["output_dir"] = str(case.folder / sharing)
        assert main(["run", str(case.save())]) == 0
        output = capsys.readouterr().out
        for stage in ("sft", "dpo"):
            assert f"{stage}: prefix sharing {sharing}: " in output
            state = read_json(RunFolder(case.folder / sharing).model(stage) / STATE_FILE)
            losses[sharing, stage] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    for stage in ("sft", "dpo"):
        assert losses["on", stage] == pytest.approx(losses["off", stage], rel=1e-4)


def test_probes_are_equal(model, collator, rows):
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.lm_head.weight.add_(0.3 * torch.randn_like(reference.lm_head.weight))
    for each in (model, reference.eval()):
        attach_head(each)
        enable_trees(each)
    settings = (ProbeArguments(rows=10, batch_size=4), SamplingArguments(max_new_tokens=5), Cooling(), 0)
    measured = []
    for joined in (collator, collator.on_trees(model)):
        probes = Probes(rows, joined, *settings)
        probes.draw_onpolicy(reference)
        measured.append(probes.measure(model, reference, CPU))
    separate, shared = measured
    assert list(shared) == list(separate)
    assert shared == pytest.approx(separate, abs=1e-5, rel=1e-5)


def test_scores_of_samples_are_equal(model, collator, rows):
    attach_head(model)
    enable_trees(model)
    answers = [[[5, 6, 2], [7, 2], [8, 9, 10, 2]], [], [[2]]]
    separate = answers_logp(model, collator, rows[:3], answers, 4)
    shared = answers_logp(model, collator.on_trees(model), rows[:3], answers, 4)
    assert [len(of_row) for of_row in shared] == [3, 0, 1]
    for ours, theirs in zip(shared, separate, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert answers_logp(model, collator.on_trees(model), rows[:1], [[]], 2) == [[]]


def choose(setting, model, collator, rows, **options):
    attach_head(model)
    return choose_sharing(setting, [model], model.eval(), collator, rows, CPU, **options)


def test_auto_leaves_short_prompts_alone(model, collator, rows):
    choice = choose("auto", model, collator, rows)
    assert str(choice) == "prefix sharing off: prompts of 5 tokens; sharing pays from 64 on"


def test_auto_shares_long_prompts(model, collator, rows, monkeypatch):
    monkeypatch.setattr("cwdpo_trainer.models.forward_checks.SHORTEST_PROMPT", 4)
    choice = choose("auto", model, collator, rows)
    assert choice.is_shared
    assert choice.reason.startswith("prompts of 5 tokens; log-probs within ")


def test_wrong_log_probs_turn_it_off(model, collator, rows, monkeypatch):
    """With positions that go on from one branch to the next, log-probs are wrong."""
    positions = shared_prefix._positions
    monkeypatch.setattr(
        shared_prefix, "_positions", lambda *args: torch.arange(positions(*args).shape[-1]).unsqueeze(0)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(20)
    with pytest.raises(InputError, match=r"LlavaForConditionalGeneration's log-probs are off by \S+ nats"):
        choose("on", model, collator, rows)


def test_on_is_refused_where_it_cannot_work(model, collator, rows):
    model.config.get_text_config().attention_dropout = 0.1
    assert not choose("auto", model, collator, rows).is_shared
    with pytest.raises(InputError, match=r"auto or off, because LlavaForConditionalGeneration has a dropout of 0\.1"):
        choose("on", model, collator, rows)
    with pytest.raises(InputError, match="auto or off, because torch_compile is on"):
        choose("on", model, collator, rows, is_compiled=True)


def test_lora_on_the_shared_path(model, collator, rows):
    policy = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert choose("on", policy, collator, rows).is_shared


def test_a_step_encodes_frozen_images_once(make_stage, model, collator, rows):
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    trainer = make_stage(CWDPOTrainer, prefix_sharing="on")
    encoded = []
    for each in (trainer.model, trainer.reference):
        each.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))
    inputs = collator(rows[:2])
    trainer._is_first_batch = False
    counts = []
    for _ in range(2):
        encoded.clear()
        trainer.compute_loss(trainer.model, inputs).backward()
        counts.append(len(encoded))
    assert counts == [2, 1]  # the first step finds out that the features need no gradient
    encoded.clear()
    trainer.probes.measure(trainer.model, trainer.reference, CPU)
    batches = -(-len(trainer.probes.rows) // trainer.probes.batch_size)
    assert len(encoded) == batches  # one for policy, reference and all sets


def test_a_model_that_fails_on_trees_trains_without(model, collator, rows, monkeypatch):
    monkeypatch.setattr("cwdpo_trainer.models.forward_checks.SHORTEST_PROMPT", 4)

    def fail(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(shared_prefix, "_positions", fail)
    choice = choose("auto", model, collator, rows)
    assert str(choice) == (
        "prefix sharing off: LlavaForConditionalGeneration fails on token trees: RuntimeError: shape mismatch"
    )
