"""The command line itself: help, version and wrong arguments. What the commands do is tested beside their modules."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cwdpo_kernels
from cwdpo_trainer.cli import main

COMMANDS = ("run", "sft", "dpo", "check", "probe", "eval", "demo")
PRINT_ALL_HELP = """
import sys
from cwdpo_trainer.cli import main

for command in ([], ["run"], ["sft"], ["dpo"], ["check"], ["probe"], ["eval"], ["demo"]):
    try:
        main([*command, "--help"])
    except SystemExit as exit:
        assert exit.code == 0
heavy = {"torch", "transformers", "accelerate", "peft", "datasets", "matplotlib", "numpy", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_imports_no_heavy_package():
    result = subprocess.run([sys.executable, "-c", PRINT_ALL_HELP], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    for command in COMMANDS:
        assert f"usage: cwdpo {command} " in result.stdout
    assert "Train a vision-language model" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert f"example: cwdpo {command}" in out


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"cwdpo {cwdpo_kernels.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["check", "x.yaml", "--rows", "0"], "argument --rows: expected an integer >= 1, got '0'"),
        (["check", "x.yaml", "--rows", "abc"], "argument --rows: expected an integer >= 1, got 'abc'"),
        (["check", "x.yaml", "--no-model", "--fast"], "unrecognized arguments: --fast"),
        (["probe", "runs/x", "data", "more"], "unrecognized arguments: more"),
        (["run"], "the following arguments are required: CONFIG"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "x.yaml", "--no-model", "dpo.beta=0.2"],
        ["check", "x.yaml", "seed=1", "--rows", "5", "dpo.beta=0.2"],
        ["check", "--no-model", "x.yaml", "dpo.beta=0.2"],
        ["run", "x.yaml", "dpo.beta=0.2"],
    ],
)
def test_overrides_and_options_mix(arguments, monkeypatch):
    parsed = []
    monkeypatch.setattr("cwdpo_trainer.cli._execute", lambda result: parsed.append(result) or 0)
    assert main(arguments) == 0
    assert parsed[0].config.name == "x.yaml"
    assert parsed[0].override[-1] == "dpo.beta=0.2"


WITHOUT_TRAINER = """
import sys
sys.modules.update({name: None for name in %r})
from cwdpo_trainer.cli import main
sys.exit(main(["check", "x.yaml"]))
"""


@pytest.mark.parametrize("missing", [["transformers", "tqdm"], ["accelerate"], ["yaml"]])
def test_a_missing_package_of_the_trainer_is_named(missing):
    command = [sys.executable, "-c", WITHOUT_TRAINER % missing]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "install what the trainer needs: pip install 'cwdpo-kernels[trainer]'" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("place", ["folder", "file/x.json", "/dev/null", "link to /dev/null", "gone/../folder"])
def test_a_file_for_results_is_checked_before_measuring(tmp_path, capsys, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link to ").mkdir()
    (tmp_path / "link to " / "dev").mkdir()
    (tmp_path / "link to " / "dev" / "null").symlink_to("/dev/null")
    assert main(["probe", "no/such/model", "rows.jsonl", "--json", str(tmp_path / place)]) == 2
    assert capsys.readouterr().err.startswith("cwdpo: command line: --json: expected ")
