"""From a YAML file (and `section.key=value` overrides) to a checked `RunConfig`.

Sections: model, lora, data, sft, dpo, probes, sampling; beside them output_dir, seed and prepare. A run has
the stages that have a section, and trains LoRA adapters if there is a section for them. Every mistake is one
`InputError` that names the file and the key.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Iterator, Sequence
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
STAGES = ("sft", "dpo")
OPTIONAL = ("lora", *STAGES)  # sections whose absence means something
# Set once for the whole run, or part of how the stages work.
RESERVED = ("output_dir", "seed", "data_seed", "remove_unused_columns", "do_train", "do_eval", "do_predict")


@dataclass
class RunConfig:
    """A run, ready to start. `raw` is the file with the overrides in it: what a run folder remembers.

    `base` is the folder that relative paths of `model` and `data` start from.
    """

    raw: dict[str, Any]
    base: Path
    output_dir: Path
    seed: int
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
    """Read, override and check the YAML file at `path`. Nothing is written, and `prepare` is not called yet.

    Raises an `InputError` about the mistake, `InputErrors` about several.
    """
    config, problems = read_config(path, overrides)
    if problems:
        raise problems[0] if len(problems) == 1 else InputErrors(f"{path}: {len(problems)} errors", problems)
    return config


def read_config(path: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig | None, list[InputError]]:
    """The configuration less what is wrong in it, and all that is wrong.

    A wrong key has its default; a stage that cannot be made is None, and without model, data or output_dir there
    is no configuration. Raises `InputError` where the file or an override cannot be read at all.
    """
    raw = _read(path)
    for override in overrides:
        _override(raw, override)
    where = str(path)
    problems: list[InputError] = []
    for key in raw:
        with _collecting(problems):
            _known_key(where, "", key, [*SECTIONS, "output_dir", "seed", "prepare"])
    sections = {name: _section(where, name, raw, problems) for name in SECTIONS}
    output_dir, seed, base = None, 0, path.parent
    with _collecting(problems):
        stages = any(name in raw for name in STAGES)
        require(stages, where, "", "a section sft or dpo", ", ".join(sorted(map(str, raw))) or "an empty file")
    with _collecting(problems):
        output_dir = _typed(where, "output_dir", raw.get("output_dir"), str)
    with _collecting(problems):
        seed = _typed(where, "seed", raw.get("seed", 0), int)
    with _collecting(problems):
        base = _prepare_folder(where, path, raw.get("prepare"))
    if output_dir is None or sections["model"] is None or sections["data"] is None:
        return None, problems
    for name in STAGES:
        if sections[name] is not None:
            sections[name].seed = seed
            sections[name].output_dir = str(Path(output_dir) / "checkpoints" / name)
    dpo = sections["dpo"]
    if dpo is not None and dpo.reference_cache is not None:
        dpo.reference_cache = str(Path(output_dir).absolute() / Path(dpo.reference_cache).expanduser())
    for name in ("probes", "sampling"):
        sections[name] = sections[name] or SECTIONS[name]()
    return RunConfig(raw, base, Path(output_dir), seed, **sections), problems


def read_section(where: str, name: str, raw: dict[str, Any]) -> Any:
    """The dataclass of one section of a file that was read already. Raises `InputError` about its first mistake."""
    problems: list[InputError] = []
    section = _section(where, name, raw, problems)
    if problems:
        raise problems[0]
    return section


@contextlib.contextmanager
def _collecting(problems: list[InputError]) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        problems.append(error)


def prepare(config: RunConfig) -> None:
    """Call the function of the `prepare` section, if there is one, with its folder and its other keys."""
    section = config.raw.get("prepare")
    if section is None:
        return
    function = _prepare_function(section["function"])
    options = {key: value for key, value in section.items() if key not in ("function", "folder")}
    try:
        inspect.signature(function).bind(config.base, **options)
    except TypeError as error:
        expected = f"arguments that {section['function']} accepts"
        raise InputError("config", "prepare", expected, f"{options} ({error})") from error
    function(config.base, **options)


def _read(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise InputError(f"{path}{line}", "", "valid YAML", f"an error: {shorten(problem)}") from error
    require(isinstance(raw, dict), str(path), "", "a mapping of sections", _describe(raw))
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
        require(isinstance(target, dict), "command line", key, f"{parent} to be a mapping", _describe(target))
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError("command line", key, "a YAML value", repr(value)) from error


def _section(where: str, name: str, raw: dict[str, Any], problems: list[InputError]) -> Any:
    """The dataclass of a section, None if it cannot be made; without one a stage and LoRA are None, another section
    has its defaults."""
    values = raw.get(name)
    if values is None and (name in OPTIONAL and name not in raw):
        return None
    values = {} if values is None else values
    kind = SECTIONS[name]
    hints = typing.get_type_hints(kind)
    typed: dict[str, Any] = {}
    with _collecting(problems):
        require(isinstance(values, dict), where, name, "a mapping", _describe(values))
        for key, value in values.items():
            with _collecting(problems):
                _known_key(where, f"{name}.", key, [key for key in hints if key not in RESERVED])
                typed[key] = _typed(where, f"{name}.{key}", value, hints[key])
        needed = [spec.name for spec in fields(kind) if spec.default is MISSING and spec.default_factory is MISSING]
        for key in needed:
            require(key in values, where, f"{name}.{key}", "a value", "none")
        if all(key in typed for key in needed):
            return _made(where, name, kind, typed)
    return None


def _made(where: str, name: str, kind: type, typed: dict[str, Any]) -> Any:
    try:
        return kind(**typed)
    except InputError as error:  # knows the key alone
        raise InputError(where, f"{name}.{error.what}", error.expected, error.got) from None
    except (ValueError, ImportError) as error:
        raise InputError(where, name, "valid options", describe(error)) from error


def _known_key(where: str, prefix: str, key: Any, known: list[str]) -> None:
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
    """`value` as type `hint`; YAML reads 1e-4 as text, so text that is a number passes for a float."""
    arms = typing.get_args(hint) if _is_union(hint) else (hint,)
    for arm in arms:
        matches, converted = _match(value, arm)
        if matches:
            return converted
    names = " or ".join(_type_name(arm) for arm in arms)
    raise InputError(where, key, f"type {names}", _describe(value))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _type_name(arm: Any) -> str:
    return "null" if arm is type(None) else getattr(arm, "__name__", str(arm))


def _match(value: Any, arm: Any) -> tuple[bool, Any]:
    """Whether `value` fits one arm of a type hint, and the value to use."""
    if arm is Any:
        return True, value
    if arm is float and not isinstance(value, bool):
        try:
            return True, float(value)
        except (TypeError, ValueError):
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


def _describe(value: Any) -> str:
    return "null" if value is None else f"{shorten(repr(value))} ({type(value).__name__})"


def _prepare_folder(where: str, path: Path, section: Any) -> Path:
    """Where relative paths start: the folder that `prepare` fills, or the one that the YAML file is in."""
    if section is None:
        return path.parent
    require(isinstance(section, dict), where, "prepare", "a mapping", _describe(section))
    for key in ("function", "folder"):
        _typed(where, f"prepare.{key}", section.get(key), str)
    try:
        _prepare_function(section["function"])
    except (ImportError, AttributeError, ValueError) as error:
        expected = "the name of a function, package.module:function"
        raise InputError(where, "prepare.function", expected, f"{section['function']!r} ({describe(error)})") from error
    return Path(section["folder"])


def _prepare_function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
