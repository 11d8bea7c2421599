"""The command line.

cwdpo {run,sft,dpo} CONFIG.yaml [section.key=value ...]
cwdpo check [CONFIG.yaml [section.key=value ...]]
cwdpo {probe,eval} RUN_OR_MODEL DATA
cwdpo demo [section.key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from cwdpo_kernels.integrations.hugging_face import HeadError
from cwdpo_trainer import recipes
from cwdpo_trainer.config.loader import STAGES, load_config
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.evaluation.measure import Subject, evaluate, probe
from cwdpo_trainer.preflight.report import check_run, environment_report
from cwdpo_trainer.reporter import say, say_error
from cwdpo_trainer.run import run

COMMANDS = {
    "run": "train the stages that CONFIG has a section for, and report",
    "sft": "stage 1 of the run alone: constrained SFT",
    "dpo": "stage 2 of the run alone: CW-DPO",
}
DEMO = Path(recipes.__file__).with_name("digits.yaml")


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
    _add_measures(commands)
    text = "both stages on handwritten digits, into runs/digits; minutes on two CPU cores"
    demo = commands.add_parser("demo", help=text, description=text)
    demo.add_argument("override", nargs="*", help="section.key=value, in place of what the recipe says")
    parsed = parser.parse_args(arguments)
    logging.disable_progress_bar()  # of loading and saving weights; training keeps its own
    if parsed.command == "check":
        if parsed.config is not None:
            return check_run(parsed.config, parsed.override, parsed.rows, load=not parsed.no_model)
        say(environment_report())
        return 0
    try:
        _do(parsed)
    except (InputError, HeadError) as error:
        say_error(f"cwdpo: {error}")
        return 2
    return 0


def _add_measures(commands: Any) -> None:
    texts = {
        "probe": "all probe figures of a model against its reference on held-out rows, and what the doctor finds",
        "eval": "greedy captions of a model: exact match and CIDEr",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("subject", metavar="RUN_OR_MODEL", help="a run's folder, or a model's folder or Hub name")
        command.add_argument("data", metavar="DATA", help="preference rows: a file, a folder or hub:owner/name")
        command.add_argument("--rows", type=_positive, help="the first ROWS of them (default: the run's, or all)")
        command.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    commands.choices["probe"].add_argument("--reference", metavar="MODEL", help="default: what the run started from")


def _do(parsed: argparse.Namespace) -> None:
    if parsed.command == "probe":
        probe(Subject.find(parsed.subject, parsed.reference), parsed.data, parsed.rows, parsed.json)
    elif parsed.command == "eval":
        evaluate(Subject.find(parsed.subject), parsed.data, parsed.rows, parsed.json)
    else:
        path = DEMO if parsed.command == "demo" else parsed.config
        only = parsed.command if parsed.command in STAGES else None
        run(load_config(path, parsed.override), only)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected --rows to have value >= 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
