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
        (["check", "x.yaml", "--rows", "0"], "argument --rows: expected a number >= 1, got 0"),
        (["run"], "the following arguments are required: CONFIG"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
