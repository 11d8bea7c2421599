"""The command line: `cwdpo COMMAND ...`.

A command imports what it needs when it runs, so that `cwdpo --help` needs neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cwdpo_trainer import recipes
from cwdpo_trainer.errors import InputError, describe
from cwdpo_trainer.files import check_writable_file, user_path
from cwdpo_trainer.reporter import say, say_error

DEMO = Path(recipes.__file__).with_name("digits.yaml")
DESCRIPTION = """\
Train a vision-language model or a text-only one on preference pairs with
Cooling-Weighted DPO.
Stage 1 is supervised fine-tuning with gentle negatives, stage 2 is CW-DPO."""
EXAMPLES = """\
examples:
  cwdpo demo                         train a tiny model on digits, on a CPU
  cwdpo check mine.yaml              find mistakes before training
  cwdpo run mine.yaml                train both stages, or resume the run
  cwdpo run mine.yaml dpo.beta=0.2   override a value of the config
  cwdpo probe runs/mine test.jsonl   measure the trained model on other pairs

'cwdpo COMMAND --help' describes a command."""
TRAINING = {
    "run": (
        "train all stages of a config and write the report",
        "Train every stage that CONFIG has a section for (sft, dpo) and write the report.\n"
        "An interrupted run resumes from its newest complete checkpoint. A finished run\n"
        "only prints its report.",
    ),
    "sft": (
        "train stage 1 only (constrained SFT)",
        "Train stage 1 only. 'cwdpo dpo CONFIG' or 'cwdpo run CONFIG' continues from it.",
    ),
    "dpo": (
        "train stage 2 only (CW-DPO)",
        "Train stage 2 only. If CONFIG has a section sft, 'cwdpo sft CONFIG' comes first.",
    ),
}
OVERRIDE = "replace a value of the config, for example dpo.beta=0.2 or output_dir=runs/other"
INSTALL = "pip install 'cwdpo-kernels[trainer]'"
INTERRUPTED = 130  # exit status after Ctrl-C, as shells report it
Commands = Any  # argparse's type of `add_subparsers` is private


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0 success, 1 errors that `check` found, 2 wrong input or a file that cannot be read or written, 130 Ctrl-C.
    """
    parsed = _parse(arguments)
    try:
        return _execute(parsed)
    except ModuleNotFoundError as error:
        say_error(f"cwdpo: {error} (install what the trainer needs: {INSTALL})")
        return 2
    except KeyboardInterrupt:
        say_error("cwdpo: interrupted (an interrupted run continues with the same command)")
        return INTERRUPTED
    except OSError as error:
        say_error(f"cwdpo: {_describe(error)}")
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments. Overrides may also follow options, which argparse does not take into one list."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(parsed, "override") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.override = [*parsed.override, *rest]
    return parsed


def _execute(parsed: argparse.Namespace) -> int:
    from transformers.utils import logging

    from cwdpo_kernels.integrations.hugging_face import HeadError

    logging.disable_progress_bar()  # of loading and saving weights; training has its own
    try:
        return parsed.execute(parsed)
    except (InputError, HeadError) as error:
        say_error(f"cwdpo: {error}")
        return 2


def _describe(error: OSError) -> str:
    """The file and what the operating system says about it: a full disk, no permission, no connection."""
    if error.filename is None:
        return describe(error)
    what = f"expected a file or folder that can be used, got {type(error).__name__}: {error.strerror}"
    return f"{error.filename}: {what}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cwdpo",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in TRAINING:
        _add_training(commands, name)
    _add_check(commands)
    _add_probe(commands)
    _add_eval(commands)
    _add_merge(commands)
    _add_demo(commands)
    return parser


class _Version(argparse.Action):
    """Print the version. `action="version"` would need it, and so torch, for every `--help`."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from cwdpo_kernels import __version__

        say(f"cwdpo {__version__}")
        parser.exit()


def _add_command(commands: Commands, name: str, summary: str, details: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=details,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_training(commands: Commands, name: str) -> None:
    command = _add_command(commands, name, *TRAINING[name], f"cwdpo {name} mine.yaml")
    command.add_argument("config", metavar="CONFIG", type=user_path, help="the run's YAML file")
    command.add_argument("override", metavar="KEY=VALUE", nargs="*", help=OVERRIDE)
    command.set_defaults(execute=_train, only=None if name == "run" else name)


def _train(parsed: argparse.Namespace) -> int:
    from cwdpo_trainer.config.loader import load_config
    from cwdpo_trainer.run import run

    run(load_config(parsed.config, parsed.override), parsed.only)
    return 0


def _add_check(commands: Commands) -> None:
    command = _add_command(
        commands,
        "check",
        "find mistakes in a config and its data before training",
        "Print the installed versions and the backends. With CONFIG, also read the config,\n"
        "the data and the model as a run would, and print every mistake, the lengths of the\n"
        "rows, and the memory and disk of the run. It writes no file, and calls the config's 'prepare'\n"
        "function only with --prepare. The exit status is 1 if there are errors.",
        "cwdpo check mine.yaml --rows 2000",
    )
    command.add_argument("config", metavar="CONFIG", type=user_path, nargs="?", help="the run's YAML file")
    command.add_argument("override", metavar="KEY=VALUE", nargs="*", help=OVERRIDE)
    text = "check N rows of each dataset, evenly spaced (default: %(default)s)"
    command.add_argument("--rows", type=_positive, metavar="N", default=512, help=text)
    text = "skip the test that loads the model and runs one pair through it"
    command.add_argument("--no-model", action="store_true", help=text)
    text = "call the config's 'prepare' function first, as a run does"
    command.add_argument("--prepare", action="store_true", help=text)
    command.set_defaults(execute=_check)


def _check(parsed: argparse.Namespace) -> int:
    from cwdpo_trainer.preflight.report import check_run, environment_report

    if parsed.config is not None:
        return check_run(parsed.config, parsed.override, parsed.rows, not parsed.no_model, parsed.prepare)
    say(environment_report())
    return 0


def _add_probe(commands: Commands) -> None:
    command = _add_command(
        commands,
        "probe",
        "measure the log-probs, calibration and drift of a trained model",
        "Measure the log-probs of chosen and rejected answers, entropy, calibration error\n"
        "and the distance from the reference model. Print what the doctor finds in them.",
        "cwdpo probe runs/mine data/test.jsonl --json probe.json",
    )
    _add_measurement(command, "use the first N rows (default: the run's probes.rows, else 128)")
    text = "the model to compare with (default: the one that the run's last stage started from)"
    command.add_argument("--reference", metavar="MODEL", help=text)
    command.set_defaults(execute=_probe)


def _probe(parsed: argparse.Namespace) -> int:
    from cwdpo_trainer.evaluation.measure import EvalTarget, probe

    _check_results_file(parsed.json)
    probe(EvalTarget.find(parsed.target, parsed.reference), parsed.data, parsed.rows, parsed.json)
    return 0


def _add_eval(commands: Commands) -> None:
    command = _add_command(
        commands,
        "eval",
        "answer held-out prompts with a trained model and score the answers",
        "Generate a greedy caption (or answer) for each distinct prompt of DATA. Print the\n"
        "share of exact matches and CIDEr.",
        "cwdpo eval runs/mine data/test.jsonl --rows 500",
    )
    _add_measurement(command, "caption the first N distinct prompts (default: all)")
    command.set_defaults(execute=_eval)


def _eval(parsed: argparse.Namespace) -> int:
    from cwdpo_trainer.evaluation.measure import EvalTarget, evaluate

    _check_results_file(parsed.json)
    evaluate(EvalTarget.find(parsed.target), parsed.data, parsed.rows, parsed.json)
    return 0


def _check_results_file(path: Path | None) -> None:
    """Raise `InputError` now rather than after the measurement."""
    if path is not None:
        check_writable_file(path, "command line", "--json")


def _add_measurement(command: argparse.ArgumentParser, rows: str) -> None:
    text = "a run folder, the folder of a model, or the name of a model on the Hub"
    command.add_argument("target", metavar="RUN_OR_MODEL", help=text)
    text = "preference pairs: a file, a folder, or hub:owner/name[:split]"
    command.add_argument("data", metavar="DATA", help=text)
    command.add_argument("--rows", type=_positive, metavar="N", help=rows)
    command.add_argument("--json", type=user_path, metavar="FILE", help="also write the results to FILE")


def _add_merge(commands: Commands) -> None:
    command = _add_command(
        commands,
        "merge",
        "write a full model from a run with LoRA",
        "Merge the adapter of a run's last finished stage into its base model, and compare\nthe logits of both.",
        "cwdpo merge runs/mine --output models/mine",
    )
    text = "a run folder, or the folder of an adapter"
    command.add_argument("target", type=user_path, metavar="RUN_OR_ADAPTER", help=text)
    command.add_argument("--output", type=user_path, metavar="FOLDER", help="default: the folder merged in it")
    command.set_defaults(execute=_merge)


def _merge(parsed: argparse.Namespace) -> int:
    from cwdpo_trainer.merge import merge

    merge(parsed.target, parsed.output)
    return 0


def _add_demo(commands: Commands) -> None:
    command = _add_command(
        commands,
        "demo",
        "train both stages on handwritten digits, on a CPU",
        "Train a tiny LLaVA from scratch to caption scenes of handwritten digits, through\n"
        "both stages. Takes minutes on two CPU cores and downloads nothing. The results are\n"
        "in runs/digits.",
        "cwdpo demo sft.max_steps=50 dpo.max_steps=20 output_dir=runs/short",
    )
    command.add_argument("override", metavar="KEY=VALUE", nargs="*", help=OVERRIDE)
    command.set_defaults(execute=_train, config=DEMO, only=None)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
