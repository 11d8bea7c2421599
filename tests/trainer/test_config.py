"""Configurations: what is read, and one line that names file and key for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import cwdpo_trainer
from cwdpo_kernels import Cooling
from cwdpo_trainer.cli import main
from cwdpo_trainer.config.loader import load_config, read_config
from cwdpo_trainer.errors import InputError


def test_sections_become_checked_settings(settings, write_config):
    settings["sft"]["learning_rate"] = "1e-4"  # what YAML makes of 1e-4
    config = load_config(write_config(settings), ["dpo.beta=0.2", "dpo.tau=2", "seed=7"])
    assert config.sft.learning_rate == 1e-4
    assert (config.dpo.beta, config.dpo.fixed_cooling.temperature, config.seed, config.dpo.seed) == (0.2, 2.0, 7, 7)
    assert config.raw["dpo"]["beta"] == 0.2
    assert config.dpo.output_dir == str(Path(settings["output_dir"]) / "checkpoints" / "dpo")
    assert config.sft.gentle_negatives.mode == "hinge"
    assert config.dpo.reference_cache == str(Path(settings["output_dir"]) / "reference_cache")


@pytest.mark.parametrize(
    ("options", "cooling"),
    [
        ("{}", Cooling()),
        ("{logp_floor: -2, tau: 0.5, drop_below: -7}", Cooling(-2.0, 0.5, drop_below=-7.0)),
        ("{cooling: constant, constant_weight: 0.4}", Cooling(constant=0.4)),
        ("{cooling: off, drop_below: -7}", Cooling(constant=1.0, drop_below=-7.0)),
        ("{cooling: off, logp_floor: auto}", Cooling(constant=1.0)),
        ("{logp_floor: auto}", None),
        ("{tau: auto}", None),
    ],
)
def test_cooling_of_a_file(settings, write_config, options, cooling):
    settings["dpo"] |= yaml.safe_load(options)
    assert load_config(write_config(settings)).dpo.fixed_cooling == cooling


def test_a_cache_of_references_may_lie_elsewhere_or_nowhere(settings, write_config, tmp_path):
    path = write_config(settings)
    assert load_config(path, [f"dpo.reference_cache={tmp_path}/shared"]).dpo.reference_cache == f"{tmp_path}/shared"
    assert load_config(path, ["dpo.reference_cache=null"]).dpo.reference_cache is None


def test_a_run_has_the_stages_that_have_a_section(settings, write_config):
    del settings["sft"]
    assert load_config(write_config(settings)).sft is None


def test_the_recipe_that_ships_is_valid():
    config = load_config(Path(cwdpo_trainer.__file__).parent / "recipes" / "digits.yaml")
    assert config.base == Path("runs/digits-data")
    assert config.sft is not None
    assert config.dpo is not None


MISTAKES = [
    (
        "dpo.bta=0.1",
        "config.yaml: expected key dpo.bta to have a known name (did you mean 'beta'?), got 'bta'",
    ),
    ("dop.beta=0.1", "expected key dop to have a known name (did you mean 'dpo'?), got 'dop'"),
    ("dpo.beta=high", "config.yaml: expected dpo.beta to have type float, got 'high' (str)"),
    ("dpo.max_steps=2.5", "expected dpo.max_steps to have type int, got 2.5 (float)"),
    ("dpo.beta=-1", "config.yaml: dpo: expected beta to have value finite and > 0, got -1.0"),
    ("dpo.tau=0", "dpo: Cooling: expected temperature to have value finite and > 0, got 0.0"),
    ("dpo.onpolicy_fraction=1.5", "dpo: expected onpolicy_fraction to have value in [0, 1], got 1.5"),
    (
        "dpo.onpolicy_fraction=[[0.5, 0], [0.2, 1]]",
        "dpo: expected onpolicy_fraction to have form a number or rising [place, value] points, got [[0.5, 0], [0.2",
    ),
    ("dpo.onpolicy_staleness=-1", "dpo: expected onpolicy_staleness to have value null or >= 0, got -1.0"),
    ("dpo.cooling=warm", "dpo: expected cooling to have value in adaptive, constant, off, got 'warm'"),
    ("dpo.cooling=true", "dpo: expected cooling to have value in adaptive, constant, off, got True"),
    ("dpo.cooling=constant", "expected constant_weight to have value a number, as cooling is constant, got None"),
    ("dpo.constant_weight=0.5", "expected constant_weight to have value null, as cooling is not constant, got 0.5"),
    ("dpo.logp_floor=low", "dpo: expected logp_floor to have value a number or auto, got 'low'"),
    ("dpo.auto_rows=1", "dpo: expected auto_rows to have value >= 2, got 1"),
    ("dpo.refresh_steps=0", "dpo: expected refresh_steps to have value >= 1, got 0"),
    ("dpo.normalize=words", "dpo: expected normalize to have value sequence or token, got 'words'"),
    ("dpo.save_total_limit=1", "dpo: expected save_total_limit to have value null or >= 2, got 1"),
    ("sft.save_only_model=true", "sft: expected save_only_model to have value False, as a stage has no use for it"),
    ("dpo.label_smoothing_factor=0.1", "dpo: expected label_smoothing_factor to have value 0.0, as a stage has no use"),
    ("dpo.early_stopping_patience=2", "dpo: expected metric_for_best_model to have value a probe"),
    ("dpo.lr_scheduler_type=wavy", "dpo: wavy is not a valid SchedulerType"),
    ("sft.negatives=harsh", "sft: GentleNegatives: expected mode to have value"),
    ("sft.output_dir=x", "expected key sft.output_dir to have a place"),
    ("data.sft_fraction=1", "data: expected sft_fraction to have value in (0, 1), got 1.0"),
    ("data.skip_bad_rows=maybe", "expected data.skip_bad_rows to have type bool, got 'maybe' (str)"),
    ("data.train=null", "expected data.train to have type str, got nothing"),
    ("model.dtype=int8", "model: expected dtype to have value in auto, float32"),
    ("probes=3", "expected probes to have type mapping, got 3 (int)"),
    ("sampling.top_p=0", "sampling: expected top_p to have value in (0, 1], got 0.0"),
    ("sampling.server=host:8000", "sampling: expected server to have form null or http://host:port, got 'host:8000'"),
    ("sampling.server=http://127.0.0.1:1", "expected prompt to have type list of messages, as sampling.server is set"),
    ("output_dir=null", "expected output_dir to have type str, got nothing"),
    ("seed=x", "expected seed to have type int, got 'x' (str)"),
    ("prepare.function=nowhere", "expected prepare.folder to have type str, got nothing"),
    ("nonsense", "command line: expected an override to have form section.key=value, got 'nonsense'"),
    ("data.train=gone.jsonl", "gone.jsonl: expected the data set to have an existing file"),
    ("model.path=./gone", "model: expected path to have an existing folder"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(settings, write_config, capsys, override, message):
    code = main(["run", str(write_config(settings)), override])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("cwdpo: ")
    assert error.count("\n") == 1
    assert message in error
    assert not Path(settings["output_dir"]).exists()


def test_all_mistakes_are_named_at_once(settings, write_config):
    overrides = ["dpo.bta=1", "dpo.max_steps=2.5", "sft.negatives=harsh", "sampling.top_p=0", "seed=x", "dop=1"]
    with pytest.raises(InputError) as error:
        load_config(write_config(settings), overrides)
    lines = str(error.value).split("\n")
    assert len(lines) == len(overrides)
    assert all(any(name in line for line in lines) for name in ("bta", "max_steps", "mode", "top_p", "seed", "dop"))


def test_what_is_right_is_read_beside_what_is_wrong(settings, write_config):
    overrides = ["dpo.bta=1", "dpo.max_steps=2.5", "sft.negatives=harsh", "sampling.top_p=0"]
    config, problems = read_config(write_config(settings), overrides)
    assert len(problems) == 4
    assert (config.sft, config.dpo.max_steps, config.dpo.refresh_steps) == (None, -1, 2)
    assert config.sampling.top_p == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "config.yaml:1: expected the file to have valid YAML"),
        ("- 1", "expected the file to have type mapping of sections, got list"),
        ("model: {}\nsft: {}\noutput_dir: x", "expected model.path to have a value, got none"),
        (
            "model: {path: m}\ndata: {train: a, heldout: b}\noutput_dir: x",
            "the file to have a section sft or dpo",
        ),
    ],
)
def test_a_malformed_file_is_named(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_prepare_is_called_with_its_folder_and_keys(settings, write_config, tmp_path, capsys):
    settings["prepare"] = {"function": "os:makedirs", "folder": str(tmp_path / "made"), "mode": 0o700}
    settings["data"]["train"] = "train.jsonl"  # beside what prepare made, where there is none
    assert main(["run", str(write_config(settings))]) == 2
    assert (tmp_path / "made").is_dir()
    assert f"{tmp_path / 'made' / 'train.jsonl'}: expected the data set" in capsys.readouterr().err


def test_bad_rows_stop_a_run_or_are_skipped_and_counted(settings, write_config, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{oops\n" * 2 + '{"prompt": "x", "chosen": "a", "rejected": "b"}\n' * 2)
    command = ["run", str(write_config(settings)), f"data.train={bad}", "model.path=./gone"]
    assert main(command) == 2
    assert f"cwdpo: {bad}: 2 of 4 rows cannot be used:\n  {bad}:1: expected the row" in capsys.readouterr().err
    assert main([*command, "data.skip_bad_rows=true"]) == 2
    said = capsys.readouterr()
    assert said.out.startswith(f"{bad}: 2 of 4 rows cannot be used and are left out:\n  {bad}:1: expected the row")
    assert "expected path to have an existing folder" in said.err  # the data did not stop it
    assert not Path(settings["output_dir"]).exists()


def test_a_wrong_key_of_prepare_is_named(settings, write_config, tmp_path, capsys):
    settings["prepare"] = {"function": "os:makedirs", "folder": str(tmp_path / "made"), "mod": 1}
    assert main(["run", str(write_config(settings))]) == 2
    assert "expected keys of os:makedirs" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
