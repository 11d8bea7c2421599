"""Reads a YAML file, and `section.key=value` overrides, into a checked `RunConfig`.

Sections: model, lora, data, sft, dpo, probes and sampling. Other keys: output_dir, seed, checkpoints, preset and
prepare. A run trains the stages (sft, dpo) that have a section, and LoRA adapters if there is a section lora. `sft:
off` is the same as no section sft; so are `dpo: off` and `lora: off`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdpo_trainer.config.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    ProbeArguments,
    SamplingArguments,
)
from cwdpo_trainer.config.presets import Preset, apply_preset
from cwdpo_trainer.config.sections import (
    OPTIONAL,
    SECTIONS,
    STAGES,
    as_type,
    check_known,
    collecting,
    make_section,
    with_type,
)
from cwdpo_trainer.config.stage_arguments import DPOArguments, SFTArguments, StageArguments
from cwdpo_trainer.config.yaml_text import DEEPEST, LARGEST_TEXT, parse_yaml
from cwdpo_trainer.errors import InputError, InputErrors, describe, require, shorten
from cwdpo_trainer.files import check_writable_folder, read_text, user_path

KEYS = (*SECTIONS, "output_dir", "seed", "checkpoints", "preset", "prepare")
KEEP, PRUNE = "keep", "prune"  # values of the key checkpoints
COMMAND_LINE = "command line"  # `InputError.where` of an override
LARGEST_SEED = 2**32 - 1  # of numpy
FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # as package.module:function
A_FUNCTION = "the name of a function, as package.module:function"


@dataclass(frozen=True)
class Preparation:
    """The section `prepare`: the function called `name`, as "package.module:function", to call with `folder` and
    `options` before a run reads its data. Only `prepare` imports it."""

    name: str
    folder: Path
    options: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}({', '.join([repr(str(self.folder)), *(f'{k}={v!r}' for k, v in self.options.items())])})"


@dataclass
class RunConfig:
    """The config of a run.

    `where` is the path of the file. `raw` is its content with preset and overrides applied; the run folder records it.
    Relative paths in `model` and `data` start at `base`. `checkpoints` of a finished stage: `PRUNE` deletes them,
    because its saved model replaces them and nothing resumes from them any more; `KEEP` does not.
    """

    where: str
    raw: dict[str, Any]
    base: Path
    output_dir: Path
    seed: int
    preset: Preset | None
    preparation: Preparation | None
    model: ModelArguments
    lora: LoraArguments | None
    data: DataArguments
    probes: ProbeArguments
    sampling: SamplingArguments
    sft: SFTArguments | None
    dpo: DPOArguments | None
    checkpoints: str = PRUNE

    @property
    def stages(self) -> list[str]:
        """Names of the stages that have a section, in the order of training."""
        return [name for name, args in self._arguments().items() if args is not None]

    def stage(self, name: str) -> StageArguments:
        """Options of the stage `name`, "sft" or "dpo". Raises `InputError` if the config has no section for it."""
        args = self._arguments()[name]
        if args is None:
            raise InputError("config", "", f"a section {name}", ", ".join(self.stages) or "no stage")
        return args

    def _arguments(self) -> dict[str, StageArguments | None]:
        return {"sft": self.sft, "dpo": self.dpo}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML file at `path`, apply its preset, then `overrides`, and check the result. Writes nothing.

    Raises `InputError`, or `InputErrors` about several mistakes.
    """
    config, errors = read_config(path, overrides)
    if errors or config is None:
        raise errors[0] if len(errors) == 1 else InputErrors(f"{path}: {len(errors)} errors", errors)
    return config


def read_config(path: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[InputError]]:
    """Return the config (invalid keys reset to defaults) and every error found.

    An optional section is None if nothing can be made of its valid keys. The config is None if model, data or
    output_dir is missing or invalid. Raises `InputError` if the file or an override cannot be parsed.
    """
    raw, where = _read(path), str(path)
    for override in overrides:
        if override.partition("=")[0] == "preset":
            _override(raw, override)
    preset = apply_preset(where, raw)
    for override in overrides:  # these win over the preset
        _override(raw, override)
    preset = None if preset is None else preset.in_effect(raw)
    for name in OPTIONAL:
        if raw.get(name) is False:
            del raw[name]
    errors: list[InputError] = []
    for key in raw:
        with collecting(errors):
            check_known(where, "", key, KEYS)
    sections = {name: make_section(where, name, raw, errors) for name in SECTIONS}
    output_dir, seed, base, preparation, checkpoints = None, 0, path.parent, None, PRUNE
    with collecting(errors):
        found = ", ".join(map(str, raw)) or "an empty file"
        require(any(name in raw for name in STAGES), where, "", "a section sft or dpo", found)
    with collecting(errors):
        text = as_type(where, "output_dir", raw.get("output_dir"), str)
        require(bool(text.strip()), where, "output_dir", "the name of a folder", repr(text))
        output_dir = user_path(text)
        check_writable_folder(output_dir, where, "output_dir")
    with collecting(errors):
        number = as_type(where, "seed", raw.get("seed", 0), int)
        require(0 <= number <= LARGEST_SEED, where, "seed", f"an integer in [0, {LARGEST_SEED}]", number)
        seed = number
    with collecting(errors):
        value = raw.get("checkpoints", PRUNE)
        require(value in (KEEP, PRUNE), where, "checkpoints", f"{KEEP} or {PRUNE}", with_type(value))
        checkpoints = value
    with collecting(errors):
        if raw.get("prepare") is not None:
            preparation = _preparation(where, raw["prepare"])
            base = preparation.folder
    if output_dir is None or sections["model"] is None or sections["data"] is None:
        return None, errors
    for name in STAGES:
        if sections[name] is not None:
            sections[name].seed = seed
            sections[name].output_dir = str(output_dir / "checkpoints" / name)
    dpo = sections["dpo"]
    if dpo is not None and dpo.reference_cache is not None:
        run_folder = Path(os.path.abspath(output_dir))
        cache = Path(os.path.abspath(run_folder / user_path(dpo.reference_cache)))
        with collecting(errors):
            expected = "a folder in output_dir or elsewhere, or null"
            found = f"{dpo.reference_cache!r}, which is output_dir itself"
            require(cache != run_folder, where, "dpo.reference_cache", expected, found)
        dpo.reference_cache = str(cache)
        if not cache.is_relative_to(run_folder):
            with collecting(errors):
                check_writable_folder(cache, where, "dpo.reference_cache")
    if sections["lora"] is not None and sections["lora"].adapter is not None:
        sections["lora"].adapter = str(user_path(sections["lora"].adapter))
    with collecting(errors):
        kind, lora = sections["model"].quantization, sections["lora"]
        require(kind is None or lora is not None, where, "model.quantization", "null without a section lora", kind)
    for name in ("probes", "sampling"):
        sections[name] = sections[name] or SECTIONS[name]()
    return RunConfig(
        where, raw, base, output_dir, seed, preset, preparation, checkpoints=checkpoints, **sections
    ), errors


def prepare(config: RunConfig) -> None:
    """Call the function of the section `prepare`, if there is one. Raises `InputError` if it cannot be called or fails.

    This imports and calls what the config names, so it is for runs only: whatever else reads a config is free of side
    effects.
    """
    preparation = config.preparation
    if preparation is None:
        return
    where, name, options = config.where, preparation.name, preparation.options
    function = _function(where, name)
    try:
        inspect.signature(function).bind(preparation.folder, **options)
    except (TypeError, ValueError) as error:
        raise InputError(where, "prepare", f"arguments that {name} accepts", f"{options} ({error})") from error
    try:
        function(preparation.folder, **options)
    except InputError:
        raise
    except Exception as error:  # whatever the user's function raises
        frame = traceback.extract_tb(error.__traceback__)[-1]
        got = f"{describe(error)} ({frame.filename}:{frame.lineno})"
        raise InputError(where, "prepare", f"a call of {name} that succeeds", got) from error


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path, 4 * LARGEST_TEXT)  # bytes; a character has at most 4
    try:
        raw = parse_yaml(text)
    except InputError as error:
        raise InputError(f"{path}{error.where}", "", error.expected, error.got) from error
    require(isinstance(raw, dict), str(path), "", "a mapping of sections", with_type(raw))
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    require(bool(equals and key), COMMAND_LINE, "", "an override of the form section.key=value", repr(override))
    *parents, last = key.split(".")
    require(len(parents) < DEEPEST, COMMAND_LINE, shorten(key, 80), f"at most {DEEPEST} levels", len(parents) + 1)
    target = raw
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        got = "off" if target is False else with_type(target)
        require(isinstance(target, dict), COMMAND_LINE, key, f"{parent} to be a mapping", got)
    try:
        target[last] = parse_yaml(value)
    except InputError as error:
        raise InputError(COMMAND_LINE, key, "a YAML value", f"{shorten(repr(value))} ({error.got})") from error


def _preparation(where: str, section: Any) -> Preparation:
    """The section `prepare`. Its folder is where relative paths start."""
    require(isinstance(section, dict), where, "prepare", "a mapping", with_type(section))
    name, folder = (as_type(where, f"prepare.{key}", section.get(key), str) for key in ("function", "folder"))
    require(FUNCTION.fullmatch(name) is not None, where, "prepare.function", A_FUNCTION, repr(name))
    options = {key: value for key, value in section.items() if key not in ("function", "folder")}
    wrong = [key for key in options if not isinstance(key, str)]
    require(not wrong, where, "prepare", "names of the function's arguments", ", ".join(map(with_type, wrong)))
    return Preparation(name, user_path(folder), options)


def _function(where: str, name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise InputError(where, "prepare.function", A_FUNCTION, f"{name!r} ({describe(error)})") from error
