"""YAML text, with clear errors. A key that is given twice is one."""

from __future__ import annotations

from typing import Any

import yaml

from cwdpo_trainer.errors import InputError, shorten


class _Loader(yaml.SafeLoader):
    """YAML's safe loader. Plain YAML would take the last of several equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                line, key = key_node.start_mark.line + 1, (key_node.tag, key_node.value)
                if key in seen:
                    problem = f"the key {key_node.value!r} a second time (first in line {seen[key]})"
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
                seen[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises `InputError`; its `where` is ":LINE", or "" if the line is unknown."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError as error:
        raise InputError("", "", "valid YAML", "an error: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise InputError(line, "", "valid YAML", f"an error: {shorten(problem)}") from error
