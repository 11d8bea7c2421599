"""The command line: `cwdpo {run,sft,dpo} CONFIG.yaml [section.key=value ...]` and `cwdpo check [CONFIG.yaml ...]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from cwdpo_kernels.adapters.hugging_face import HeadError
from cwdpo_trainer.check import check_run, environment_report
from cwdpo_trainer.config import load_config
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.run import run

COMMANDS = {
    "run": "train the stages that CONFIG has a section for, and report",
    "sft": "stage 1 of the run alone: constrained SFT",
    "dpo": "stage 2 of the run alone: CW-DPO",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0; wrong input is a message on stderr and 2, errors that `check` found are 1."""
    parser = argparse.ArgumentParser(prog="cwdpo", description="Cooling-Weighted DPO of vision-language models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, help="the YAML file of the run")
        command.add_argument("override", nargs="*", help="section.key=value, in place of what the file says")
    text = "what is installed; with CONFIG also what its run would train on, and every mistake in it"
    check = commands.add_parser("check", help=text, description=text)
    check.add_argument("config", type=Path, nargs="?", help="the YAML file of the run")
    check.add_argument("override", nargs="*", help="section.key=value, in place of what the file says")
    check.add_argument("--rows", type=_positive, default=512, help="rows of each data set to look at one by one")
    check.add_argument("--no-model", action="store_true", help="do not load the model to try it on one pair")
    parsed = parser.parse_args(arguments)
    logging.disable_progress_bar()  # of loading and saving weights; training keeps its own
    if parsed.command == "check":
        if parsed.config is not None:
            return check_run(parsed.config, parsed.override, parsed.rows, load=not parsed.no_model)
        print(environment_report())
        return 0
    try:
        config = load_config(parsed.config, parsed.override)
        run(config, only=None if parsed.command == "run" else parsed.command)
    except (InputError, HeadError) as error:
        print(f"cwdpo: {error}", file=sys.stderr)
        return 2
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected --rows to have value >= 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
