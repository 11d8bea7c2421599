"""Configs are read and checked. Every mistake is one line that names the file and the key."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

import cwdpo_trainer
from cwdpo_kernels import Cooling, cooling_weight
from cwdpo_trainer.cli import main
from cwdpo_trainer.config.loader import load_config, read_config
from cwdpo_trainer.data.sources import open_source
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.models.loading import model_path
from cwdpo_trainer.run_folder import _record


def test_sections_become_checked_options(settings, write_config):
    settings["sft"]["learning_rate"] = "1e-4"  # YAML reads 1e-4 as text
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
        ("{}", Cooling(-3.0, 1.0, drop_below=-3.0 - math.log(19))),
        ("{logp_floor: -2, tau: 0.5}", Cooling(-2.0, 0.5, drop_below=-2.0 - 0.5 * math.log(19))),
        ("{logp_floor: -2, tau: 0.5, drop_below: null}", Cooling(-2.0, 0.5)),
        ("{logp_floor: -2, tau: 0.5, drop_below: -7}", Cooling(-2.0, 0.5, drop_below=-7.0)),
        ("{cooling: constant, constant_weight: 0.4, drop_below: null}", Cooling(constant=0.4)),
        ("{cooling: constant, constant_weight: 0.4}", Cooling(constant=0.4, drop_below=-3.0 - math.log(19))),
        ("{cooling: off, drop_below: -7}", Cooling(constant=1.0, drop_below=-7.0)),
        ("{cooling: off, logp_floor: auto, drop_below: null}", Cooling(constant=1.0)),
        ("{cooling: off, logp_floor: auto}", None),  # drop_below: auto needs the measured floor
        ("{logp_floor: auto}", None),
        ("{tau: auto}", None),
    ],
)
def test_cooling_options(settings, write_config, options, cooling):
    settings["dpo"] |= yaml.safe_load(options)
    assert load_config(write_config(settings)).dpo.fixed_cooling == cooling


def test_drop_below_auto_is_where_the_weight_is_a_twentieth(settings, write_config):
    cooling = load_config(write_config(settings), ["dpo.logp_floor=-2.5", "dpo.tau=0.7"]).dpo.fixed_cooling
    assert cooling_weight(torch.tensor([cooling.drop_below]), cooling).item() == pytest.approx(0.05)


def test_a_path_may_start_with_the_home_folder(settings, write_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my model").mkdir()
    paths = ["model.path=~/my model", "dpo.reference_cache=~/shared", "output_dir=~/run", "lora.adapter=~/adapter"]
    config = load_config(write_config(settings), paths)
    assert model_path(config) == str(tmp_path / "my model")
    assert config.dpo.reference_cache == f"{tmp_path}/shared"
    assert (config.output_dir, config.dpo.folder) == (tmp_path / "run", tmp_path / "run/checkpoints/dpo")
    assert config.lora.adapter == f"{tmp_path}/adapter"
    assert open_source("~/rows.jsonl").path == tmp_path / "rows.jsonl"
    assert open_source("~no-such-user/rows.jsonl", tmp_path).path == tmp_path / "~no-such-user/rows.jsonl"
    prepare = "prepare={function: 'cwdpo_trainer.recipes.digits.prepare:prepare', folder: ~/data}"
    assert load_config(write_config(settings), [prepare]).base == tmp_path / "data"
    config.model.path = "~/gone"  # is no name on the Hub
    with pytest.raises(
        InputError, match=f"model.path: expected an existing folder or a name on the Hub, got {tmp_path}/gone"
    ):
        model_path(config)


@pytest.mark.parametrize(
    "override",
    ["dpo.beta=1e39", "dpo.beta=1e-45", "dpo.tau=1e39", "dpo.tau=1e-45", "dpo.logp_floor=-1e39", "dpo.drop_below=1e39",
     "sft.nll_floor=1e39", "sft.negatives_weight=1e39"],
)  # fmt: skip
def test_a_number_that_float32_cannot_hold_is_named(settings, write_config, override):
    key, value = override.split("=")
    with pytest.raises(InputError) as error:
        load_config(write_config(settings), [override])
    assert str(error.value).endswith(f"{key}: expected a magnitude in [1.2e-38, 3.4e+38], got {float(value)}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=", "output_dir: expected type str, got null"),
        ("output_dir=''", "output_dir: expected the name of a folder, got ''"),
        ("output_dir='  '", "output_dir: expected the name of a folder, got '  '"),
        ('output_dir="~\\0x"', "output_dir: expected a folder that can be made and written to, got '~\\x00x'"),
        ("output_dir={tmp}/dangling", "(/{tmp}/dangling is a link to nothing)"),
        ('data.train="~\\0x"', "no such file"),
        ('model.path="~\\0x"', "model.path: expected an existing folder or a name on the Hub"),
        ("model.path=" + "x" * 300, "model.path: expected an existing folder or a name on the Hub, got /"),
        (
            "model.path=https://huggingface.co/a/b",
            "model.path: expected an existing folder or a name on the Hub, got /",
        ),
        ("model.path='a b'", "model.path: expected an existing folder or a name on the Hub, got /"),
        (
            "dpo.reference_cache=''",
            "dpo.reference_cache: expected a folder in output_dir or elsewhere, or null, got ''",
        ),
        (
            "dpo.reference_cache=.",
            "dpo.reference_cache: expected a folder in output_dir or elsewhere, or null, got '.'",
        ),
        ("dpo.reference_cache=../file/x", "dpo.reference_cache: expected a folder that can be made and written to"),
    ],
)
def test_odd_paths_are_one_error(settings, write_config, tmp_path, capsys, override, message):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert main(["run", str(write_config(settings)), override.replace("{tmp}", str(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert message.replace("/{tmp}", str(tmp_path)) in error
    assert error.startswith("cwdpo: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_reference_cache_can_be_elsewhere_or_disabled(settings, write_config, tmp_path):
    path = write_config(settings)
    assert load_config(path, [f"dpo.reference_cache={tmp_path}/shared"]).dpo.reference_cache == f"{tmp_path}/shared"
    assert load_config(path, ["dpo.reference_cache=null"]).dpo.reference_cache is None


def test_activation_checkpointing_is_passed_on_under_its_name_in_every_transformers_release(settings, write_config):
    settings["sft"]["activation_checkpointing"] = True
    config = load_config(write_config(settings))
    assert config.sft.gradient_checkpointing  # the name that all of them read
    assert not config.dpo.gradient_checkpointing


def test_a_run_has_the_stages_that_have_a_section(settings, write_config):
    del settings["sft"]
    config = load_config(write_config(settings))
    assert config.sft is None
    assert (config.stages, config.stage("dpo")) == (["dpo"], config.dpo)
    with pytest.raises(InputError, match="config: expected a section sft, got dpo"):
        config.stage("sft")


def test_the_recipe_that_ships_is_valid():
    config = load_config(Path(cwdpo_trainer.__file__).parent / "recipes" / "digits.yaml")
    assert config.base == Path("runs/digits-data")
    assert config.sft is not None
    assert config.dpo is not None


MISTAKES = [
    (
        "dpo.bta=0.1",
        "config.yaml: dpo.bta: expected a known key (did you mean 'beta'?), got 'bta'",
    ),
    ("dop.beta=0.1", "dop: expected a known key (did you mean 'dpo'?), got 'dop'"),
    ("dpo.beta=high", "config.yaml: dpo.beta: expected type float, got 'high' (str)"),
    ("dpo.max_steps=2.5", "dpo.max_steps: expected type int, got 2.5 (float)"),
    ("dpo.beta=-1", "config.yaml: dpo.beta: expected a finite number > 0, got -1.0"),
    (
        "dpo.tau=0",
        "dpo.tau: expected a finite number > 0 or auto, got 0.0",
    ),
    ("dpo.onpolicy_fraction=1.5", "dpo.onpolicy_fraction: expected numbers in [0, 1], got 1.5"),
    (
        "dpo.onpolicy_fraction=[[0.5, 0], [0.2, 1]]",
        "dpo.onpolicy_fraction: expected a number, or [position, fraction] points with increasing positions, got [[0.5",
    ),
    ("dpo.onpolicy_staleness=-1", "dpo.onpolicy_staleness: expected null or a number >= 0, got -1.0"),
    ("dpo.cooling=warm", "dpo.cooling: expected one of adaptive, constant, off, got 'warm'"),
    ("dpo.cooling=true", "dpo.cooling: expected one of adaptive, constant, off, got True"),
    ("dpo.cooling=constant", "dpo.constant_weight: expected a number in [0, 1], as cooling is constant, got null"),
    ("dpo.constant_weight=0.5", "dpo.constant_weight: expected null, as cooling is not constant, got 0.5"),
    ("dpo.logp_floor=low", "dpo.logp_floor: expected a finite number or auto, got 'low'"),
    ("dpo.drop_below=.inf", "dpo.drop_below: expected null, a finite number or auto, got inf"),
    ("dpo.drop_below=low", "dpo.drop_below: expected null, a finite number or auto, got 'low'"),
    ("dpo.tau=1e308", "dpo.tau: expected a number for which logp_floor - 2.94 tau is finite, as drop_below is auto"),
    ("dpo.auto_rows=1", "dpo.auto_rows: expected an integer >= 2, got 1"),
    ("dpo.refresh_steps=0", "dpo.refresh_steps: expected an integer >= 1, got 0"),
    ("dpo.normalize=words", "dpo.normalize: expected sequence or token, got 'words'"),
    ("dpo.save_total_limit=1", "dpo.save_total_limit: expected null or an integer >= 2, got 1"),
    (
        "sft.save_only_model=true",
        "sft.save_only_model: expected the default, false (a stage must be able",
    ),
    (
        "dpo.label_smoothing_factor=0.1",
        "dpo.label_smoothing_factor: expected the default, 0.0 (for rejected",
    ),
    ("dpo.early_stopping_patience=2", "dpo.metric_for_best_model: expected the name of a probe metric"),
    (
        "dpo.lr_scheduler_type=wavy",
        "dpo.lr_scheduler_type: expected a value that can be used, got 'wavy' (ValueError: wavy is not a valid",
    ),
    ("seed=-1", "config.yaml: seed: expected an integer in [0, 4294967295], got -1"),
    ("seed=4294967296", "seed: expected an integer in [0, 4294967295], got 4294967296"),
    (f"output_dir={__file__}/x", f"that can be made and written to, got '{__file__}/x' ({__file__} is a file)"),
    ("output_dir=/proc/x", "output_dir: expected a folder that can be made and written to, got '/proc/x' (FileNot"),
    ('output_dir="a\\0b"', "output_dir: expected a folder that can be made and written to, got 'a\\x00b' (ValueError"),
    (f"output_dir={'n' * 300}", "output_dir: expected a folder that can be made and written to, got 'nnnn"),
    ("dpo.reference_cache=/proc/x", "dpo.reference_cache: expected a folder that can be made and written to"),
    ("model.quantization=4bit", "model.quantization: expected null without a section lora, got 4bit"),
    ("model.path=''", "model.path: expected a folder or a name on the Hub, got ''"),
    ("data.heldout=' '", "data.heldout: expected a file, a folder or hub:owner/name, got ' '"),
    ("dpo.seed=1", "dpo.seed: expected no such key in a section: set seed at the top level, got 'seed'"),
    ("dpo.do_train=true", "dpo.do_train: expected no such key: the trainer sets this option itself"),
    (
        "dpo={beta: 1, beta: 2}",
        "command line: dpo: expected a YAML value, got '{beta: 1, beta: 2}' (an error: t",
    ),
    ("dpo=" + "[" * 9000, "command line: dpo: expected a YAML value"),
    (
        "sft.negatives=harsh",
        "sft.negatives: expected one of hinge, hard, smoothed, got 'harsh'",
    ),
    ("sft.output_dir=x", "sft.output_dir: expected no such key in a section: set output_dir at the top level"),
    ("data.sft_fraction=1", "data.sft_fraction: expected a number in (0, 1), got 1.0"),
    ("data.skip_bad_rows=maybe", "data.skip_bad_rows: expected type bool, got 'maybe' (str)"),
    ("data.train=null", "data.train: expected type str, got null"),
    ("model.dtype=int8", "model.dtype: expected one of auto, float32"),
    ("probes=3", "probes: expected a mapping, got 3 (int)"),
    ("sampling.top_p=0", "sampling.top_p: expected a number in (0, 1], got 0.0"),
    ("sampling.server=host:8000", "sampling.server: expected null or a URL such as http://host:port, got 'host:8000'"),
    ("sampling.server=http://127.0.0.1:1", "prompt: expected a list of messages, as sampling.server is set"),
    ("output_dir=null", "output_dir: expected type str, got null"),
    ("seed=x", "seed: expected type int, got 'x' (str)"),
    ("prepare.function=nowhere", "prepare.folder: expected type str, got null"),
    ("prepare=3", "prepare: expected a mapping, got 3 (int)"),
    ("prepare={function: 'os:nothing', folder: x}", "prepare.function: expected the name of a function, as package"),
    ("dpo.stage=sft", "dpo.stage: expected a known key"),
    ("dpo.accelerator_config=[1]", "dpo.accelerator_config: expected type dict or str or null, got [1] (list)"),
    ("seed=2020-13-45", "command line: seed: expected a YAML value, got '2020-13-45'"),
    ("{seed: 1}.x=2", "config.yaml: {seed: 1}: expected"),
    ("seed.x=2", "command line: seed.x: expected seed to be a mapping, got 1 (int)"),
    (f"dpo.beta={10**400}", "dpo.beta: expected type float"),
    ("nonsense", "command line: expected an override of the form section.key=value, got 'nonsense'"),
    ("data.train=gone.jsonl", "gone.jsonl: no such file"),
    ("model.path=./gone", "config.yaml: model.path: expected an existing folder"),
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


def test_all_mistakes_are_reported_at_once(settings, write_config):
    overrides = ["dpo.bta=1", "dpo.max_steps=2.5", "sft.negatives=harsh", "sampling.top_p=0", "seed=x", "dop=1"]
    with pytest.raises(InputError) as error:
        load_config(write_config(settings), overrides)
    title, *lines = str(error.value).split("\n  ")
    assert title.endswith("config.yaml: 6 errors:")
    assert len(lines) == len(error.value.errors) == len(overrides)
    assert all(
        any(name in line for line in lines) for name in ("bta", "max_steps", "negatives", "top_p", "seed", "dop")
    )


def test_all_mistakes_of_a_section_are_reported_at_once(settings, write_config):
    overrides = ["beta=-1", "tau=-1", "refresh_steps=0", "curriculum=x", "learning_rate=-1", "optim=adma",
                 "lr_scheduler_type=wavy", "stop_on=[x, squeezing, y]"]  # fmt: skip
    with pytest.raises(InputError) as error:
        load_config(write_config(settings), [f"dpo.{override}" for override in overrides])
    assert [one.what.removeprefix("dpo.") for one in error.value.errors] == [
        "learning_rate", "stop_on", "stop_on", "tau", "beta", "curriculum", "refresh_steps", "lr_scheduler_type",
        "optim",
    ]  # fmt: skip


def test_a_consequence_of_a_mistake_is_not_reported(settings, write_config):
    overrides = ["dpo.cooling=warm", "dpo.constant_weight=0.5", "sft.dataloader_num_workers=-1",
                 "sft.dataloader_prefetch_factor=2"]  # fmt: skip
    with pytest.raises(InputError) as error:
        load_config(write_config(settings), overrides)
    assert [one.what for one in error.value.errors] == ["sft.dataloader_num_workers", "dpo.cooling"]


def test_valid_options_are_read_despite_invalid_ones(settings, write_config):
    overrides = ["dpo.bta=1", "dpo.max_steps=2.5", "sft.negatives=harsh", "sampling.top_p=0"]
    config, problems = read_config(write_config(settings), overrides)
    assert len(problems) == 4
    assert (config.sft.negatives, config.sft.max_steps) == ("hinge", 6)
    assert (config.dpo.max_steps, config.dpo.refresh_steps) == (-1, 2)
    assert config.sampling.top_p == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "config.yaml:1: expected valid YAML, got an error: expected ',' or ']'"),
        ("", "config.yaml: expected a mapping of sections, got null"),
        ("1: 2", "config.yaml: 1: expected one of the keys model, lora"),
        ("a: 2020-13-45", "config.yaml:1: expected valid YAML, got an error: '2020-13-45' is no timestamp"),
        (
            "dpo: {beta: 1, tau: 2,\n  beta: 7}",
            "config.yaml:2: expected valid YAML, got an error: the key 'beta' a",
        ),
        (
            "dpo:\n  beta: 1\nsft: {}\ndpo:\n  tau: 1",
            "config.yaml:4: expected valid YAML, got an error: the key 'dpo' a",
        ),
        ("[" * 9000, "config.yaml:1: expected valid YAML, got an error: more than 50 levels"),
        ("- 1", "expected a mapping of sections, got [1] (list)"),
        ("model: {}\nsft: {}\noutput_dir: x", "model.path: expected a value, got none"),
        (
            "model: {path: m}\ndata: {train: a, heldout: b}\noutput_dir: x",
            "expected a section sft or dpo",
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


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}: expected a file, got a folder$"):
        load_config(tmp_path)


def test_prepare_is_called_with_its_folder_and_keys(settings, write_config, tmp_path, capsys):
    settings["prepare"] = {"function": "os:makedirs", "folder": str(tmp_path / "made"), "mode": 0o700}
    settings["data"]["train"] = "train.jsonl"  # relative to the folder of prepare, which does not contain it
    assert main(["run", str(write_config(settings))]) == 2
    assert (tmp_path / "made").is_dir()
    assert f"{tmp_path / 'made' / 'train.jsonl'}: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["run"], ["check", "--prepare"]])
def test_an_exception_of_prepare_is_one_error(settings, write_config, tmp_path, capsys, command):
    settings["prepare"] = {"function": "os:listdir", "folder": str(tmp_path / "gone")}
    assert main([*command, str(write_config(settings))]) > 0
    printed = capsys.readouterr()
    assert "config.yaml: prepare: expected a call of os:listdir that succeeds, got FileNotFoundError" in (
        printed.err + printed.out
    )


def test_a_merge_key_may_be_overridden(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "base: &base {max_steps: 3}\nsft: {<<: *base, max_steps: 4}\noutput_dir: x\n"
        "model: {path: m}\ndata: {train: a, heldout: b}"
    )
    config, (error,) = read_config(tmp_path / "c.yaml")
    assert (config.sft.max_steps, error.what) == (4, "base")


def test_invalid_rows_stop_a_run_or_are_skipped_and_counted(settings, write_config, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{oops\n" * 2 + '{"prompt": "x", "chosen": "a", "rejected": "b"}\n' * 2)
    command = ["run", str(write_config(settings)), f"data.train={bad}", "model.path=./gone"]
    assert main(command) == 2
    assert f"cwdpo: {bad}: 2 of 4 rows are invalid:\n  {bad}:1: expected valid JSON" in capsys.readouterr().err
    assert main([*command, "data.skip_bad_rows=true"]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{bad}: 2 of 4 rows are invalid and are skipped:\n  {bad}:1: expected valid JSON")
    assert "model.path: expected an existing folder" in printed.err  # the data did not stop the run
    assert not Path(settings["output_dir"]).exists()


def test_a_wrong_key_of_prepare_is_named(settings, write_config, tmp_path, capsys):
    settings["prepare"] = {"function": "os:makedirs", "folder": str(tmp_path / "made"), "mod": 1}
    assert main(["run", str(write_config(settings))]) == 2
    assert "prepare: expected arguments that os:makedirs accepts" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_the_record_of_a_run_has_no_secrets(settings, write_config):
    settings["prepare"] = {"function": "os:makedirs", "folder": ".", "api_key": "KKK", "url": "https://me:KKK@host"}
    config = load_config(write_config(settings), ["dpo.hub_token=hf_KKK"])
    recorded = _record(config, {})
    assert recorded["config"]["prepare"]["url"] == "https://***@host"
    assert "KKK" not in str(recorded)
