"""Sections of a config file: keys and types are checked, and each becomes a dataclass of *arguments.py."""

from __future__ import annotations

import contextlib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from cwdpo_trainer.config.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    ProbeArguments,
    SamplingArguments,
)
from cwdpo_trainer.config.stage_arguments import DPOArguments, SFTArguments
from cwdpo_trainer.config.training_options import OURS
from cwdpo_trainer.errors import InputError, InputErrors, describe, did_you_mean, require, shorten

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
WORDS = ("prefix_sharing",)  # options with the values on and off, which YAML reads as true and false
OPTIONAL = ("lora", *STAGES)  # without such a section, the run does without LoRA or without the stage
# Options of `TrainingArguments` that no section may set.
TOP_LEVEL = ("output_dir", "seed")
RESERVED = tuple(OURS)


# Names of options, and parts of texts, that give access to something. The text up to the group 1 is kept.
_SECRETS = (
    "token|secret|passw(?:or)?d|passphrase|(?:api|access|secret|private|signing|encryption|account)[ _-]?key|"
    "credentials?|signature|authorization|cookie"
)
SECRET_NAME = re.compile(rf"(?:^|[_\s-])(?:{_SECRETS})$", re.IGNORECASE)
CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
SECRET_TEXTS = (
    re.compile(r"(\w://)[^/\s@]+(?=@)"),
    re.compile(rf"([?&][\w-]*(?:{_SECRETS}|sig|auth)=)[^&\s#]+", re.IGNORECASE),
    re.compile(r"\b(bearer\s+)[\w.~+/=-]{16,}", re.IGNORECASE),
    # KEY=value, "Key: value", "Authorization: Basic value"
    re.compile(rf"(\b(?:[\w-]*[_-])?(?:{_SECRETS})\s*[=:]\s*)(?:(?:bearer|basic)\s+)?[^\s&#]+", re.IGNORECASE),
    re.compile(r"\b(hf_|sk-|gh[opsur]_|github_pat_|glpat-|xox[abeprs]-|AKIA|ASIA|AIza|eyJ)[\w.-]{16,}"),
)


@contextlib.contextmanager
def collecting(errors: list[InputError]) -> Iterator[None]:
    """Append an `InputError` of the block to `errors`."""
    try:
        yield
    except InputError as error:
        errors.append(error)


def read_section(where: str, name: str, raw: dict[str, Any]) -> Any:
    """The dataclass of section `name` of a parsed file. Raises `InputError` about its first mistake."""
    errors: list[InputError] = []
    section = make_section(where, name, raw, errors)
    if errors:
        raise errors[0]
    return section


def make_section(where: str, name: str, raw: dict[str, Any], errors: list[InputError]) -> Any:
    """The dataclass of section `name`, with the valid ones of its keys; every mistake is added to `errors`.

    None if the section is absent and optional, or if nothing can be made of the valid keys.
    """
    if name in OPTIONAL and name not in raw:
        return None
    kind, values = SECTIONS[name], raw.get(name)
    values = {} if values is None else values
    options = {spec.name: spec for spec in fields(kind) if spec.init}
    known = [option for option in options if option not in RESERVED]
    hints = typing.get_type_hints(kind)
    typed: dict[str, Any] = {}
    with collecting(errors):
        require(isinstance(values, dict), where, name, "a mapping", with_type(values))
        for key, value in values.items():
            with collecting(errors):
                check_known(where, f"{name}.", key, known)
                if key in WORDS and isinstance(value, bool):
                    value = "on" if value else "off"
                typed[key] = as_type(where, f"{name}.{key}", value, hints[key])
        needed = [key for key, spec in options.items() if spec.default is MISSING and spec.default_factory is MISSING]
        for key in needed:
            with collecting(errors):
                require(key in values, where, f"{name}.{key}", "a value", "none")
        section, found = _make(kind, typed, needed)
        errors += [InputError(where, ".".join(filter(None, (name, e.what))), e.expected, e.got) for e in found]
        return section
    return None


def _make(kind: type, typed: dict[str, Any], needed: Sequence[str]) -> tuple[Any, list[InputError]]:
    """`kind` with those of the options `typed` that it accepts, or None; and what is wrong with the others.

    The checks of the dataclasses name all mistakes at once. Libraries name one at a time and not always the option, so
    the option is found by leaving them out in turn.
    """
    found: list[InputError] = []
    options = dict(typed)
    while all(key in options for key in needed):
        try:
            return kind(**options), found
        except InputError as error:
            mistakes = list(error.errors) if isinstance(error, InputErrors) else [error]
            if not found:  # else it is a consequence of leaving an option out
                found = mistakes
        except Exception as error:  # transformers, accelerate and torch raise many types for a wrong option
            mistakes = [_about_option(kind, options, needed, error)]
            found += [one for one in mistakes if not found or _fails_alone(kind, options, needed, one.what)]
        wrong = {error.what for error in mistakes} & options.keys()
        if not wrong:
            break
        options = {key: value for key, value in options.items() if key not in wrong}
    return None, found


def _about_option(kind: type, options: dict[str, Any], needed: Sequence[str], error: Exception) -> InputError:
    """The error about the option without which `kind` can be made, or at least fails in another way."""
    others = [key for key in options if key not in needed]
    outcomes = {key: _failure(kind, {name: value for name, value in options.items() if name != key}) for key in others}
    culprits = [key for key, outcome in outcomes.items() if outcome is None]
    culprits += [key for key, outcome in outcomes.items() if outcome != _failure(kind, options)]
    if not culprits:
        return InputError("config", "", "valid options", describe(error))
    key = culprits[0]
    return InputError("config", key, "a value that can be used", f"{shorten(repr(options[key]))} ({describe(error)})")


def _fails_alone(kind: type, options: dict[str, Any], needed: Sequence[str], key: str) -> bool:
    return _failure(kind, {name: value for name, value in options.items() if name == key or name in needed}) is not None


def _failure(kind: type, options: dict[str, Any]) -> str | None:
    """What `kind(**options)` raises, as text."""
    try:
        kind(**options)
    except Exception as error:
        return describe(error)
    return None


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without access tokens, keys and passwords, at any depth: entries with such a name are left out, and
    secrets inside of texts, such as the password of a URL, are replaced by `***`."""
    return {key: _without_secrets(value) for key, value in settings.items() if not _is_secret(str(key))}


def _is_secret(name: str) -> bool:
    return SECRET_NAME.search(CAMEL_CASE.sub("_", name)) is not None


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, list):
        return [_without_secrets(one) for one in value]
    if not isinstance(value, str):
        return value
    for secret in SECRET_TEXTS:
        value = secret.sub(r"\1***", value)
    return value


def check_known(where: str, prefix: str, key: Any, known: Sequence[str]) -> None:
    """Raise `InputError` about a key that is not in `known`."""
    if key in known:
        return
    hint = did_you_mean(key, known)
    expected = f"a known key{hint}"
    if prefix and key in TOP_LEVEL:
        expected = f"no such key in a section: set {key} at the top level"
    elif prefix and key in RESERVED:
        expected = "no such key: the trainer sets this option itself"
    elif not hint and prefix == "":
        expected = "one of the keys " + ", ".join(known)
    raise InputError(where, f"{prefix}{key}", expected, repr(key))


def as_type(where: str, key: str, value: Any, hint: Any) -> Any:
    """`value` as type `hint`. YAML reads 1e-4 as text, so text is converted where a float is expected."""
    arms = typing.get_args(hint) if _is_union(hint) else (hint,)
    for arm in arms:
        matches, converted = _match(value, arm)
        if matches:
            return converted
    names = " or ".join(_type_name(arm) for arm in arms)
    raise InputError(where, key, f"type {names}", with_type(value))


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


def with_type(value: Any) -> str:
    """A value and its type, for a message."""
    return "null" if value is None else f"{shorten(repr(value))} ({type(value).__name__})"
