"""Reads a YAML file, and `section.key=value` overrides, into a checked `RunConfig`.

Sections: model, lora, data, sft, dpo, probes and sampling. Other keys: output_dir, seed and prepare. A run trains the
stages (sft, dpo) that have a section, and LoRA adapters if there is a section lora.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from cwdpo_trainer.config.arguments import (
    DataArguments,
    DPOArguments,
    LoraArguments,
    ModelArguments,
    ProbeArguments,
    SamplingArguments,
    SFTArguments,
    StageArguments,
)
from cwdpo_trainer.errors import InputError, InputErrors, describe, require, shorten
from cwdpo_trainer.files import read_text

SECTIONS: dict[str, type] = {
    "model": ModelArguments,
    "lora": LoraArguments,
    "data": DataArguments,
    "sft": SFTArguments,
    "dpo": DPOArguments,
    "probes": ProbeArguments,
    "sampling": SamplingArguments,
}
KEYS = (*SECTIONS, "output_dir", "seed", "prepare")
STAGES = ("sft", "dpo")
OPTIONAL = ("lora", *STAGES)  # without such a section, the run does without LoRA or without the stage
# Options of `TrainingArguments` that the run sets for all stages, or that the stages depend on.
RESERVED = ("output_dir", "seed", "data_seed", "remove_unused_columns", "do_train", "do_eval", "do_predict")


@dataclass(frozen=True)
class Preparation:
    """The section `prepare`: a function to call with a folder and `options` before a run reads its data."""

    function: Callable[..., Any]
    options: dict[str, Any]


@dataclass
class RunConfig:
    """The config of a run.

    `raw` is the file's content with overrides applied; the run folder records it. Relative paths in `model` and `data`
    start at `base`.
    """

    raw: dict[str, Any]
    base: Path
    output_dir: Path
    seed: int
    preparation: Preparation | None
    model: ModelArguments
    lora: LoraArguments | None
    data: DataArguments
    probes: ProbeArguments
    sampling: SamplingArguments
    sft: SFTArguments | None
    dpo: DPOArguments | None

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
    """Read the YAML file at `path`, apply `overrides` and check the result. Writes nothing.

    Raises `InputError`, or `InputErrors` about several mistakes.
    """
    config, errors = read_config(path, overrides)
    if errors or config is None:
        raise errors[0] if len(errors) == 1 else InputErrors(f"{path}: {len(errors)} errors", errors)
    return config


def read_config(path: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[InputError]]:
    """Return the config (invalid keys reset to defaults) and every error found.

    A stage with invalid options is None. The config is None if model, data or output_dir is missing or invalid.
    Raises `InputError` if the file or an override cannot be parsed.
    """
    raw = _read(path)
    for override in overrides:
        _override(raw, override)
    where = str(path)
    errors: list[InputError] = []
    for key in raw:
        with _collecting(errors):
            _check_known(where, "", key, KEYS)
    sections = {name: _section(where, name, raw, errors) for name in SECTIONS}
    output_dir, seed, base, preparation = None, 0, path.parent, None
    with _collecting(errors):
        found = ", ".join(map(str, raw)) or "an empty file"
        require(any(name in raw for name in STAGES), where, "", "a section sft or dpo", found)
    with _collecting(errors):
        output_dir = _typed(where, "output_dir", raw.get("output_dir"), str)
    with _collecting(errors):
        seed = _typed(where, "seed", raw.get("seed", 0), int)
    with _collecting(errors):
        if raw.get("prepare") is not None:
            base, preparation = _preparation(where, raw["prepare"])
    if output_dir is None or sections["model"] is None or sections["data"] is None:
        return None, errors
    for name in STAGES:
        if sections[name] is not None:
            sections[name].seed = seed
            sections[name].output_dir = str(Path(output_dir) / "checkpoints" / name)
    dpo = sections["dpo"]
    if dpo is not None and dpo.reference_cache is not None:
        dpo.reference_cache = str(Path(output_dir).absolute() / Path(dpo.reference_cache).expanduser())
    for name in ("probes", "sampling"):
        sections[name] = sections[name] or SECTIONS[name]()
    return RunConfig(raw, base, Path(output_dir), seed, preparation, **sections), errors


def read_section(where: str, name: str, raw: dict[str, Any]) -> Any:
    """The dataclass of section `name` of a parsed file. Raises `InputError` about its first mistake."""
    errors: list[InputError] = []
    section = _section(where, name, raw, errors)
    if errors:
        raise errors[0]
    return section


def prepare(config: RunConfig) -> None:
    """Call the function of the section `prepare`, if there is one."""
    if config.preparation is not None:
        config.preparation.function(config.base, **config.preparation.options)


@contextlib.contextmanager
def _collecting(errors: list[InputError]) -> Iterator[None]:
    """Append an `InputError` of the block to `errors`."""
    try:
        yield
    except InputError as error:
        errors.append(error)


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise InputError(f"{path}{line}", "", "valid YAML", f"an error: {shorten(problem)}") from error
    require(isinstance(raw, dict), str(path), "", "a mapping of sections", _with_type(raw))
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    require(bool(equals and key), "command line", "", "an override of the form section.key=value", repr(override))
    *parents, last = key.split(".")
    target = raw
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        require(isinstance(target, dict), "command line", key, f"{parent} to be a mapping", _with_type(target))
    try:
        target[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError("command line", key, "a YAML value", repr(value)) from error


def _section(where: str, name: str, raw: dict[str, Any], errors: list[InputError]) -> Any:
    """The dataclass of section `name` with its valid keys, or None if it is absent and optional, or cannot be made."""
    if name in OPTIONAL and name not in raw:
        return None
    kind, values = SECTIONS[name], raw.get(name)
    values = {} if values is None else values
    options = {spec.name: spec for spec in fields(kind) if spec.init}
    known = [option for option in options if option not in RESERVED]
    hints = typing.get_type_hints(kind)
    typed: dict[str, Any] = {}
    with _collecting(errors):
        require(isinstance(values, dict), where, name, "a mapping", _with_type(values))
        for key, value in values.items():
            with _collecting(errors):
                _check_known(where, f"{name}.", key, known)
                typed[key] = _typed(where, f"{name}.{key}", value, hints[key])
        needed = [key for key, spec in options.items() if spec.default is MISSING and spec.default_factory is MISSING]
        for key in needed:
            require(key in values, where, f"{name}.{key}", "a value", "none")
        if all(key in typed for key in needed):
            return _make(where, name, kind, typed)
    return None


def _make(where: str, name: str, kind: type, typed: dict[str, Any]) -> Any:
    try:
        return kind(**typed)
    except InputError as error:  # the dataclass does not know its file and section
        raise InputError(where, f"{name}.{error.what}", error.expected, error.got) from None
    except Exception as error:  # transformers, accelerate and torch raise many types for a wrong option
        raise InputError(where, name, "valid options", describe(error)) from error


def _check_known(where: str, prefix: str, key: Any, known: Sequence[str]) -> None:
    if key in known:
        return
    close = difflib.get_close_matches(str(key), known, n=1)
    expected = "a known key"
    if key in RESERVED:
        expected = "no such key in a section, as it is set once for the whole run"
    elif close:
        expected = f"a known key (did you mean {close[0]!r}?)"
    elif prefix == "":
        expected = "one of the keys " + ", ".join(known)
    raise InputError(where, f"{prefix}{key}", expected, repr(key))


def _typed(where: str, key: str, value: Any, hint: Any) -> Any:
    """`value` as type `hint`. YAML reads 1e-4 as text, so text is converted where a float is expected."""
    arms = typing.get_args(hint) if _is_union(hint) else (hint,)
    for arm in arms:
        matches, converted = _match(value, arm)
        if matches:
            return converted
    names = " or ".join(_type_name(arm) for arm in arms)
    raise InputError(where, key, f"type {names}", _with_type(value))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _type_name(arm: Any) -> str:
    return "null" if arm is type(None) else getattr(arm, "__name__", str(arm))


def _match(value: Any, arm: Any) -> tuple[bool, Any]:
    """Whether `value` has the type `arm` (one arm of a union), and the converted value."""
    if arm is Any:
        return True, value
    if arm is float and not isinstance(value, bool):
        try:
            return True, float(value)
        except (TypeError, ValueError, OverflowError):
            return False, value
    if typing.get_origin(arm) is typing.Literal:
        return value in typing.get_args(arm), value
    kind = typing.get_origin(arm) or arm
    if isinstance(value, bool):
        return kind is bool, value
    if kind is list:
        item = (typing.get_args(arm) or (Any,))[0]
        return isinstance(value, list) and all(_match(one, item)[0] for one in value), value
    return isinstance(value, kind), value


def _with_type(value: Any) -> str:
    return "null" if value is None else f"{shorten(repr(value))} ({type(value).__name__})"


def _preparation(where: str, section: Any) -> tuple[Path, Preparation]:
    """The folder of the section `prepare`, where relative paths start, and the call that fills it."""
    require(isinstance(section, dict), where, "prepare", "a mapping", _with_type(section))
    name, folder = (_typed(where, f"prepare.{key}", section.get(key), str) for key in ("function", "folder"))
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        expected = "the name of a function, as package.module:function"
        raise InputError(where, "prepare.function", expected, f"{name!r} ({describe(error)})") from error
    options = {key: value for key, value in section.items() if key not in ("function", "folder")}
    try:
        inspect.signature(function).bind(Path(folder), **options)
    except (TypeError, ValueError) as error:
        raise InputError(where, "prepare", f"arguments that {name} accepts", f"{options} ({error})") from error
    return Path(folder), Preparation(function, options)
