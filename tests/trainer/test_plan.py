"""The plan of `cwdpo check`: predicted memory of a step against the measured one, disk, parameters and advice."""

from __future__ import annotations

import copy
import itertools
import shutil
from types import SimpleNamespace

import medium_models
import pytest
import torch
from transformers import TrainerCallback

from cwdpo_kernels import Cooling
from cwdpo_trainer.cli import main
from cwdpo_trainer.config.arguments import LoraArguments, ModelArguments, ProbeArguments, SamplingArguments
from cwdpo_trainer.config.stage_arguments import DPOArguments, SFTArguments
from cwdpo_trainer.evaluation.probes import Probes
from cwdpo_trainer.models.adapters import new_adapter
from cwdpo_trainer.models.freezing import freeze
from cwdpo_trainer.models.kinds import auto_class, read_config
from cwdpo_trainer.models.reference import freeze_reference
from cwdpo_trainer.preflight import plan
from cwdpo_trainer.preflight.parts import parameter_report
from cwdpo_trainer.preflight.simulation import Simulation, predict_step, unique_bytes
from cwdpo_trainer.stages.dpo import CWDPOTrainer
from cwdpo_trainer.stages.sft import ConstrainedSFTTrainer

CPU = torch.device("cpu")
SAMPLING = SamplingArguments(max_new_tokens=2)
STAGES = {"sft": (SFTArguments, ConstrainedSFTTrainer), "dpo": (DPOArguments, CWDPOTrainer)}


class PeakOfStep(TrainerCallback):
    """Bytes of the second step's largest total beyond what it starts with, exact, from torch's allocator; and bytes of
    the optimizer's state."""

    def on_step_begin(self, args, state, control, optimizer, **_):
        if state.global_step == 1:
            values = (value for of_weight in optimizer.state.values() for value in of_weight.values())
            self.state = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
            self.profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            )  # acc_events: else torch 2.11 warns
            self.profiler.__enter__()

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 2:
            self.profiler.__exit__(None, None, None)
            events = self.profiler.profiler.kineto_results.events()
            changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
            changes.sort(key=lambda change: change[0])
            self.peak = max(itertools.accumulate(size for _, size in changes))


def measured_peak(folder, collator, rows, args, kind, lora, sharing):
    """Bytes beyond the weights of model and reference, at the peak of a real step."""
    torch.manual_seed(0)
    model = auto_class(str(folder), config := read_config(str(folder))).from_config(config)
    if lora:
        model, _ = new_adapter(model, lora, [])
    probes = Probes(rows, collator, ProbeArguments(rows=1), SAMPLING, Cooling(), seed=0)
    more = {"sampling": SAMPLING} if kind is CWDPOTrainer else {}
    trainer = kind(
        model, freeze_reference(model), args, rows, collator, probes, prefix_sharing=sharing, **more
    )  # fmt: skip
    meter = PeakOfStep()
    trainer.add_callback(meter)
    trainer.train()
    return meter.peak + meter.state


@pytest.mark.parametrize(
    ("name", "stage", "is_lora", "checkpointing", "sharing"),
    [
        pytest.param("llama", "sft", False, False, "off", marks=pytest.mark.slow),
        ("llama", "sft", False, True, "on"),
        ("llama", "dpo", True, False, "on"),
        pytest.param("llava", "dpo", True, True, "off", marks=pytest.mark.slow),
        ("llava", "sft", False, False, "on"),
        ("qwen2_5_vl", "dpo", False, True, "on"),
        pytest.param("qwen2_5_vl", "sft", True, False, "off", marks=pytest.mark.slow),
    ],
)
def test_predictions_are_close_to_measurements(tmp_path, name, stage, is_lora, checkpointing, sharing):
    """Beyond the loaded model and reference. With tied heads one [V, D] too many may be counted: autograd adds the two
    gradients of a real weight in place, those of a fake one in new memory."""
    collator, rows = medium_models.save_config(name, tmp_path, pairs=2)
    arguments, kind = STAGES[stage]
    more = {"drop_below": None, "reference_cache": None} if stage == "dpo" else {}
    args = arguments(
        output_dir=str(tmp_path / "stage"), max_steps=2, per_device_train_batch_size=2, eval_strategy="no",
        eval_on_start=False, save_strategy="no", disable_tqdm=True, report_to="none",
        activation_checkpointing=checkpointing, **more,
    )  # fmt: skip
    lora = LoraArguments() if is_lora else None

    def make():
        return Simulation.of(ModelArguments(str(tmp_path)), str(tmp_path), lora, CPU)

    memory = predict_step(make, copy.copy(args), collator, rows, sharing == "on", is_first=True)
    predicted = memory.total - memory.peak["weights"] - memory.peak.get("reference", 0)
    measured = measured_peak(tmp_path, collator, rows * 2, args, kind, lora, sharing)
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("name", "stacks"), [("llama_12", 1), ("gemma3_text", 1)])
def test_fewer_layers_predict_the_same(tmp_path, monkeypatch, name, stacks):
    """The extrapolation from four and five periods of layers is exact, with checkpointing as well."""
    collator, rows = medium_models.save_config(name, tmp_path, pairs=2)
    args = SFTArguments(output_dir=str(tmp_path), report_to="none", activation_checkpointing=name == "llama_12")
    steps = []
    step = Simulation.step
    monkeypatch.setattr(Simulation, "step", lambda *given: steps.append(given) or step(*given))

    def make():
        return Simulation.of(ModelArguments(str(tmp_path)), str(tmp_path), None, CPU)

    folded = predict_step(make, args, collator, rows, False, True)
    assert len(steps) == 1 + stacks
    whole = make().step(args, collator, rows, False, True)
    assert folded.total == pytest.approx(whole.total, rel=1e-3)
    assert (folded.saved, folded.state) == (whole.saved, whole.state)


def test_accumulated_gradients_are_there_in_the_next_forward(tmp_path):
    collator, rows = medium_models.save_config("llama", tmp_path, pairs=1)
    options = {"output_dir": str(tmp_path), "report_to": "none"}
    totals = []
    for steps in (1, 4):
        args = SFTArguments(**options, gradient_accumulation_steps=steps)
        simulation = Simulation.of(ModelArguments(str(tmp_path)), str(tmp_path), None, CPU)
        totals.append(simulation.step(args, collator, rows, False, True).total)
    gradients = unique_bytes(simulation.model.parameters())
    assert totals[0] < totals[1] <= totals[0] + gradients


def test_parameters_of_each_part(tmp_path):
    medium_models.save_config("qwen2_5_vl", tmp_path)
    settings = ModelArguments(str(tmp_path), freeze=["merger"])
    full = parameter_report(Simulation.of(settings, str(tmp_path), None, CPU).model)
    assert [line.partition(":")[0] for line in full[:4]] == [
        "vision tower (model.visual)", "connector (model.visual.merger)", "language model (model.language_model)",
        "head (lm_head)",
    ]  # fmt: skip
    assert full[1].endswith(" parameters, frozen")
    assert full[3] == "head (lm_head): 1,048,576 parameters, 1,048,576 trained in full"
    lora = LoraArguments(target_modules=["q_proj"], modules_to_save=["lm_head"], r=4)
    adapted = parameter_report(Simulation.of(settings, str(tmp_path), lora, CPU).model)
    assert adapted[0].endswith("parameters, frozen")
    assert adapted[2].endswith(f"parameters, {4 * 4 * (256 + 256):,} trained in LoRA adapters")
    assert adapted[3].endswith("1,048,576 trained in full")


def test_a_model_that_fits(case, capsys):
    assert main(["check", str(case.save()), "--no-model"]) == 0
    out = capsys.readouterr().out
    assert "  vision tower (model.vision_tower): " in out
    assert "  memory of a step of stage sft: " in out
    assert "for the 4 longest pairs, a prompt for each answer (88 tokens); peak in " in out
    assert "KiB with shared prompts (" in out
    assert "  disk: " in out
    assert out.endswith("\n0 errors, 0 warnings\n")


def test_what_helps_if_memory_is_short(case, capsys, monkeypatch):
    monkeypatch.setattr(plan, "device_memory", lambda device: plan.RUNTIME + 1000)
    assert main(["check", str(case.save()), "--no-model"]) == 0
    out = capsys.readouterr().out
    assert "warning memory: a step of stage " in out
    assert "and the process 512.0 MiB, but only 512.0 MiB are available" in out
    (advice,) = (line for line in out.splitlines() if "try these, best first" in line)
    batch = "per_device_train_batch_size: 1 with gradient_accumulation_steps: 4"
    for change in ("activation_checkpointing: true", batch, "model.dtype: bfloat16", "all of these"):
        assert change in advice
    changes = advice.partition("after each: ")[2].split("; ")
    sizes = [float(change.rpartition("(")[2].partition(" KiB)")[0]) for change in changes]
    assert sizes[:-1] == sorted(sizes[:-1])
    assert sizes[-1] <= sizes[0]


def test_a_disk_that_is_too_small(case, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert main(["check", str(case.save()), "--no-model"]) == 0
    assert "warning disk: the run writes up to " in capsys.readouterr().out


def disk(case, capsys):
    """The predicted bytes: at most, and of them for a checkpoint that replaces another."""
    assert main(["check", str(case.save()), "--no-model"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  disk: "))
    units = {"KiB": 1 << 10, "MiB": 1 << 20}
    return [float(text.split()[0]) * units[text.split()[1]]
            for text in (line.removeprefix("  disk: "), line.rpartition(", ")[2])]  # fmt: skip


def test_the_disk_of_a_run(case, capsys):
    case.settings["checkpoints"] = "keep"
    total, extra = disk(case, capsys)
    main(["run", str(case.save())])
    kinds = ("*.safetensors", "optimizer.pt")
    written = sum(f.stat().st_size for kind in kinds for f in (case.folder / "run").rglob(kind))
    assert total - extra == pytest.approx(written, rel=0.2)  # at the end, no checkpoint is being written
    kept = sum(f.stat().st_size for kind in kinds for f in (case.folder / "run" / "checkpoints" / "sft").rglob(kind))
    case.settings["checkpoints"] = "prune"  # when stage 2 trains, stage 1 has no checkpoints left
    case.settings["output_dir"] = str(case.folder / "other")
    assert disk(case, capsys)[0] == pytest.approx(total - kept, rel=0.2)


def test_frozen_modules_are_not_trained_in_the_simulation(tmp_path):
    medium_models.save_config("llava", tmp_path)
    settings = ModelArguments(str(tmp_path), freeze=["vision_tower"])
    model = Simulation.of(settings, str(tmp_path), None, CPU).model
    real = auto_class(str(tmp_path), config := read_config(str(tmp_path))).from_config(config)
    freeze(real, ["vision_tower"])
    assert {name for name, each in model.named_parameters() if each.requires_grad} == {
        name for name, each in real.named_parameters() if each.requires_grad
    }


def test_a_model_that_cannot_be_simulated_is_no_error(case, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(Simulation, "step", fail)
    assert main(["check", str(case.save()), "--no-model"]) == 0
    expected = (
        "memory of a step: not predicted, because the model does not run without weights: RuntimeError: data-dependent"
    )
    assert expected in capsys.readouterr().out
