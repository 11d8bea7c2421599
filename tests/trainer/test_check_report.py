"""`cwdpo check CONFIG`: what it prints, samples and refuses to execute."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from cwdpo_kernels.integrations.hugging_face import attach_head
from cwdpo_trainer.cli import main
from cwdpo_trainer.models.loading import load_model
from cwdpo_trainer.preflight import trial
from cwdpo_trainer.preflight.dry_run import dry_run, typical_steps
from cwdpo_trainer.preflight.report import histogram
from cwdpo_trainer.preflight.run_rules import ERROR


def test_a_valid_run_has_no_problems_and_nothing_is_written(case, capsys):
    assert main(["check", str(case.save())]) == 0
    out = capsys.readouterr().out
    assert "data.train: train.jsonl (32 of 32 rows checked, 32 valid)" in out
    assert "tokens, whole pair (prompt, images, longer answer): 9 to 11, median 11" in out
    assert "tokens, images: all 4" in out
    assert "LlavaForConditionalGeneration: 16,864 parameters in float32, head 17 x 32" in out
    assert "memory of the head in one step of stage sft: " in out
    assert "self-test: LlavaForConditionalGeneration: head 17 x 32, float32" in out
    assert f"log-probs of {case.folder}/train.jsonl:1 agree within" in out
    line = r"negative filtering: dpo.drop_below -\d+.\d\d \(nats per token\) leaves out \d+ of the first 32 pairs "
    assert re.search(line, out)
    for stage in ("sft", "dpo"):
        line = rf"time of a step of stage {stage}: \S+ s \(4 pairs of median length\), \S+ s for 6 steps without probes"
        assert re.search(line, out)
    assert out.endswith("\n0 errors, 0 warnings\n")
    assert not Path(case.settings["output_dir"]).exists()


@pytest.mark.parametrize("with_sft", [True, False])
def test_a_filter_that_leaves_out_every_pair(case, capsys, with_sft):
    if not with_sft:
        del case.settings["sft"]
    case.settings["dpo"]["drop_below"] = 0.0
    assert main(["check", str(case.save())]) == 0
    out = capsys.readouterr().out
    when = " before stage 1" if with_sft else ""
    assert f"warning nothing_kept: dpo.drop_below leaves 0 of 32 pairs in the loss{when}\n  -> lower dpo." in out
    assert out.endswith("\n0 errors, 1 warning\n")


def test_equal_negatives_are_no_error_if_only_logp_floor_is_measured(case, capsys):
    for row in case.train:
        row |= {"prompt": "<image>", "rejected": "blue", "images": case.train[0]["images"]}
    case.settings["dpo"] |= {"logp_floor": "auto", "tau": 0.5}
    main(["check", str(case.save())])
    out = capsys.readouterr().out
    assert "leaves out 0 of the first 32 pairs" in out
    assert "error self_test" not in out


def test_memory_is_predicted_for_trimmed_rows(case, capsys):
    case.settings["data"]["max_length"] = 9  # prompts have 5 tokens, answers 4 or 6
    assert main(["check", str(case.save())]) == 0
    assert "for the 4 longest pairs: 8 sequences of 9 tokens, 32 of them labeled" in capsys.readouterr().out


@pytest.mark.parametrize("metric", ["near_cooling", "eval_onpolicy_tv", "chosen_ece"])
def test_every_probe_metric_is_accepted(case, metric):
    assert case.problems(f"dpo.metric_for_best_model={metric}") == []


def test_a_missing_dependency_of_the_processor_is_named(case, monkeypatch):
    def load(path, **options):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr("cwdpo_trainer.models.loading.AutoProcessor.from_pretrained", load)
    (problem,) = case.problems()
    assert problem.name == "processor"
    assert "requires the Torchvision library" in problem.evidence


def test_the_time_of_a_step_is_that_of_all_its_micro_steps(case, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(trial.time, "perf_counter", lambda: float(next(clock)))
    case.settings["sft"] |= {"gradient_accumulation_steps": 3, "max_steps": 2600, "per_device_train_batch_size": 2}
    preview, _ = dry_run(case.save(), (), rows=100)
    sft, dpo = typical_steps(preview)
    assert {preview.lengths["train"][row.id].total for row in sft.rows} <= {9, 11}
    assert len(sft.rows) == 2
    model = load_model(preview.config.model, preview.model_path, None)
    attach_head(model)
    before = copy.deepcopy(model.state_dict())
    times = [trial.measure_step(model, preview.collator, step) for step in (sft, dpo)]
    assert str(times[0]).startswith("time of a step of stage sft: 3 s (3 x 2 pairs of median length), 2.2 h for 2600 ")
    assert times[1].seconds == 1
    preview.config.sft.gradient_accumulation_steps = 64  # an epoch has 12 batches
    assert typical_steps(preview)[0].micro_steps == 12
    dpo.args.torch_compile = True
    assert "(4 pairs of median length, without torch_compile)" in str(times[1])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_warnings_alone_exit_with_0(case, capsys):
    assert main(["check", str(case.save()), "dpo.beta=50", "--no-model"]) == 0
    assert "warning beta: dpo.beta is 50" in capsys.readouterr().out


def test_an_invalid_dataset_does_not_hide_mistakes_in_the_other(case):
    case.train = ["{oops", "[]"]
    swap = case.heldout[0]
    case.heldout[0] = {**swap, "chosen": swap["rejected"], "rejected": swap["chosen"]}
    names = [problem.name for problem in case.problems()]
    assert names == ["invalid_rows", "invalid_rows", "train", "rejected_is_a_reference"]


@pytest.mark.parametrize("override", ["model=null", "data.train=3", "nonsense"])
def test_an_unusable_config_is_reported(case, capsys, override):
    assert main(["check", str(case.save()), override]) == 1
    assert "error config: " in capsys.readouterr().out


def test_an_invalid_section_prepare_is_one_problem(case):
    (problem,) = case.problems("prepare=3")
    assert (problem.name, "prepare: expected a mapping, got 3 (int)" in problem.evidence) == ("config", True)


@pytest.mark.parametrize("function", ["shutil:rmtree", "planted:main", "cwdpo_trainer.recipes.digits:prepare"])
def test_a_check_neither_imports_nor_calls_what_a_config_names(case, function, monkeypatch, capsys):
    (case.folder / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(case.folder)
    case.settings["prepare"] = {"function": function, "folder": str(case.folder)}
    before = sorted(case.save().parent.rglob("*"))
    assert main(["check", str(case.save()), "--no-model"]) == 0
    assert sorted(case.folder.rglob("*")) == before
    printed = capsys.readouterr().out
    assert f"warning prepare: skipped the call {function}('{case.folder}'): check does not execute" in printed
    assert "  -> if it makes files that are missing: cwdpo check CONFIG --prepare" in printed


def test_a_check_calls_the_function_if_told_to(case):
    case.settings["prepare"] = {"function": "pathlib:Path.mkdir", "folder": str(case.folder / "made")}
    (problem,) = case.problems()
    assert "prepare.function: expected the name of a function, as package.module:function" in problem.evidence
    case.settings["prepare"] = {"function": "os:makedirs", "folder": str(case.folder / "made")}
    case.settings["model"]["path"] = str(case.folder / "model")  # a relative path would start at the made folder
    case.settings["data"] = {name: str(case.folder / f"{name}.jsonl") for name in ("train", "heldout")}
    main(["check", str(case.save()), "--no-model", "--prepare"])
    assert (case.folder / "made").is_dir()


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
def test_code_that_came_with_a_model_is_refused(case, file, monkeypatch):
    """Nothing is run, and nobody is asked."""
    path, name = (
        case.folder / "model" / file,
        {"config.json": "AutoConfig", "processor_config.json": "AutoProcessor"}[file],
    )
    (case.folder / "model" / "planted.py").write_text(f"open({str(case.folder / 'ran')!r}, 'w')\n")
    settings = json.loads(path.read_text()) | {"auto_map": {name: "planted.Planted"}}
    settings |= {"model_type": "planted"} if file == "config.json" else {"processor_class": "Planted"}
    path.write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert any(problem.severity == ERROR for problem in case.problems())
    assert not (case.folder / "ran").exists()


def test_the_self_test_finds_the_processor_of_another_model(case, capsys):
    """It makes more tokens per image than the model has features."""
    case.processor(patch_size=2).save_pretrained(case.folder / "model")
    assert main(["check", str(case.save())]) == 1
    assert "error self_test: ValueError: Image features and image tokens do not match" in capsys.readouterr().out


def test_the_sample_is_evenly_spaced(case):
    preview, _ = dry_run(case.save(), ["data.max_length=10"], rows=10)
    assert [row.id for row in preview.sample["train"]] == [0, 4, 8, 12, 16, 20, 24, 28]
    assert len(preview.fits["train"].rows) == 8


def test_unused_columns_are_named(case, capsys):
    rows = [{**row, "images": [str(case.folder / row["images"][0])], "model": "x"} for row in case.train]
    Dataset.from_list(rows).save_to_disk(case.folder / "set")
    assert main(["check", str(case.save()), "data.train=set", "--no-model"]) == 0
    assert "unused columns: model" in capsys.readouterr().out


def test_histogram_bins():
    lines = histogram("tokens", [1, 1, 2, 17, 30])
    assert lines[0] == "  tokens: 1 to 30, median 2"
    assert [line.split() for line in lines[1:]] == [
        ["1", "-", "4", "#" * 40, "3"], ["5", "-", "8", "0"], ["9", "-", "12", "0"], ["13", "-", "16", "0"],
        ["17", "-", "20", "#" * 14, "1"], ["21", "-", "24", "0"], ["25", "-", "28", "0"],
        ["29", "-", "30", "#" * 14, "1"],
    ]  # fmt: skip
    assert histogram("tokens", [3, 3]) == ["  tokens: all 3"]
