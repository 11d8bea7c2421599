"""Presets: named changes of a config, such as the paper's ablations. Each is a YAML file in the folder presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cwdpo_trainer.config.yaml_text import parse_yaml
from cwdpo_trainer.errors import InputError, did_you_mean, require
from cwdpo_trainer.files import read_text

FOLDER = Path(__file__).with_name("presets")


@dataclass(frozen=True)
class Preset:
    """A preset that was applied. `changes`: (before, after) by key, such as `dpo.drop_below` or `sft` (a stage left
    out), without those that the config had already or that an override replaced."""

    name: str
    changes: dict[str, tuple[Any, Any]]

    def in_effect(self, raw: dict[str, Any]) -> Preset:
        """The preset with the changes that still hold in `raw`, after overrides."""
        return Preset(self.name, {key: change for key, change in self.changes.items() if _get(raw, key) == change[1]})

    def __str__(self) -> str:
        changes = (f"{key}: {_yaml(after)} (was {_yaml(before)})" for key, (before, after) in self.changes.items())
        return f"preset {self.name}: " + (", ".join(changes) or "changes nothing")


def preset_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def apply_preset(where: str, raw: dict[str, Any]) -> Preset | None:
    """Change the parsed config `raw` as its key `preset` says. The preset's values replace those of the config.

    Sections that the config does not have stay absent. Returns None without the key `preset`. Raises `InputError` for
    an unknown name, and if the config has none of the sections that the preset changes.
    """
    name = raw.get("preset")
    if name is None:
        return None
    names = preset_names()
    if name not in names:
        expected = f"null or one of {', '.join(names)}{did_you_mean(name, names)}"
        raise InputError(where, "preset", expected, repr(name))
    sections = parse_yaml(read_text(FOLDER / f"{name}.yaml"))
    present = [section for section in sections if raw.get(section, False) is not False]
    missing = " or ".join(f"a section {section}" for section in sections)
    require(bool(present), where, "preset", f"{missing}, which {name} changes", "none")
    changes: dict[str, tuple[Any, Any]] = {}
    for section in present:
        changes |= _change(where, raw, section, sections[section])
    return Preset(name, {key: change for key, change in changes.items() if change[0] != change[1]})


def _change(where: str, raw: dict[str, Any], section: str, values: Any) -> dict[str, tuple[Any, Any]]:
    if values is False:  # the stage is left out
        raw[section] = False
        return {section: (True, False)}
    options = raw[section] if raw[section] is not None else {}
    require(isinstance(options, dict), where, section, "a mapping", repr(options))
    before = {key: options.get(key, "default") for key in values}
    raw[section] = {**options, **values}
    return {f"{section}.{key}": (before[key], after) for key, after in values.items()}


def _get(raw: dict[str, Any], key: str) -> Any:
    section, _, option = key.partition(".")
    found = raw.get(section)
    return found.get(option, "default") if option and isinstance(found, dict) else found


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "null" if value is None else str(value)
