"""YAML text, with clear errors and limits. A key that is given twice is an error.

The limits hold for the text as it reads once every alias is replaced by what it stands for: later code copies, compares
and prints the values, and a few lines of aliases can stand for billions of them.
"""

from __future__ import annotations

from typing import Any

import yaml

from cwdpo_trainer.errors import InputError, shorten, surrogate_in

LARGEST_TEXT = 1_000_000  # characters
LARGEST_VALUE = 10_000  # scalars, sequences and mappings together
DEEPEST = 50  # sequences and mappings inside one another
LONGEST_NUMBER = 1000  # characters; Python takes quadratic time to read longer ones


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with limits. Plain YAML would take the last of several equal keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.level = 0  # of the node that is being composed
        self.composed = 0  # nodes so far
        # Nodes by identity: the nodes below each, and the levels, once aliases are replaced.
        self.extents: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self.level += 1
        self.composed += 1
        _check_limits(self.composed, self.level, event.start_mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        if node is not None and id(node) not in self.extents:
            if isinstance(event, yaml.AliasEvent):
                raise _error(f"*{event.anchor} inside of the value that &{event.anchor} names", event.start_mark)
            below = [self.extents[id(each)] for each in _children(node)]
            size, depth = 1 + sum(size for size, _ in below), 1 + max((depth for _, depth in below), default=0)
            _check_limits(size, depth, node.start_mark)
            self.extents[id(node)] = size, depth
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and surrogate_in(node.value) is not None:
            raise _error("half of a surrogate pair, which is no text", node.start_mark)
        try:
            return super().construct_object(node, deep)
        # What PyYAML raises about a scalar that does not fit its tag: an impossible date, `!!int ''`, `!!bool x`.
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            problem = f"{shorten(repr(node.value), 80)} is no {node.tag.rpartition(':')[2]} ({error})"
            raise _error(problem, node.start_mark) from error

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > LONGEST_NUMBER:
            problem = f"a number of {len(node.value)} characters (at most {LONGEST_NUMBER})"
            raise _error(problem, node.start_mark)
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # a wrong node is refused below
            if isinstance(key_node, yaml.ScalarNode):
                line, key = key_node.start_mark.line + 1, self._key(key_node)
                if key in seen:
                    problem = f"the key {shorten(repr(key_node.value), 80)} a second time (first in line {seen[key]})"
                    raise _error(problem, key_node.start_mark)
                seen[key] = line
        return super().construct_mapping(node, deep)

    def _key(self, node: yaml.ScalarNode) -> Any:
        """What makes two keys equal: 1 and 0x1 are one key of a dictionary."""
        return node.tag if node.tag.endswith(":merge") else ("", self.construct_object(node))


for _type in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_type}", _Loader.construct_number)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_limits(size: int, depth: int, mark: yaml.Mark) -> None:
    """Raise for a value of `size` nodes or `depth` levels that is too large."""
    copies = "with every alias replaced by its value"
    if size > LARGEST_VALUE:
        raise _error(f"more than {LARGEST_VALUE} values, {copies}", mark)
    if depth > DEEPEST + 1:  # a scalar at the bottom
        raise _error(f"more than {DEEPEST} levels, {copies}: nested too deeply", mark)


def _error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=mark)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises `InputError`; its `where` is ":LINE", or "" if the line is unknown."""
    if len(text) > LARGEST_TEXT:
        raise InputError("", "", f"at most {LARGEST_TEXT} characters", len(text))
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except (OverflowError, ValueError) as error:  # an escape beyond Unicode, such as "\U00110000"
        where = f":{loader.line + 1}" if loader is not None else ""
        raise InputError(where, "", "valid YAML", f"an error: a character that does not exist ({error})") from error
    except yaml.YAMLError as error:
        problem, line = _describe(error, text)
        raise InputError(f":{line}" if line else "", "", "valid YAML", f"an error: {shorten(problem)}") from error


def _describe(error: yaml.YAMLError, text: str) -> tuple[object, int]:
    """The problem, and its line (0: unknown)."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character U+{error.character:04X} ({error.reason})", text.count("\n", 0, error.position) + 1
    if not isinstance(error, yaml.MarkedYAMLError):
        return error, 0
    # "but found another document" makes no sense alone. Other contexts only name what is being parsed.
    context = f"{error.context}, " if error.context and str(error.problem).startswith("but ") else ""
    return f"{context}{error.problem}", error.problem_mark.line + 1 if error.problem_mark else 0
