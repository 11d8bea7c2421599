"""YAML that is hostile or broken: bounded in time and memory, and one error with the file and the line."""

from __future__ import annotations

import pytest

from cwdpo_trainer.cli import main
from cwdpo_trainer.config.loader import read_config
from cwdpo_trainer.config.yaml_text import DEEPEST, LARGEST_TEXT, LARGEST_VALUE, parse_yaml
from cwdpo_trainer.errors import InputError

pytestmark = pytest.mark.usefixtures("fails_after_a_minute")


def bomb(levels: int, line: str) -> str:
    """`levels` lines, each of which stands for ten times as much as the one before."""
    return "l0: &l0 [x]\n" + "".join(line.format(n=n, ref=f"*l{n - 1}") for n in range(1, levels))


LISTS = bomb(12, "l{n}: &l{n} [" + ", ".join(["{ref}"] * 10) + "]\n")
MAPPINGS = bomb(12, "l{n}: &l{n} {{" + ", ".join(f"{letter}: {{ref}}" for letter in "abcdefghij") + "}}\n")
MERGES = "l0: &l0 {x: 1}\n" + "".join(f"l{n}: &l{n} {{<<: [{', '.join([f'*l{n - 1}'] * 10)}]}}\n" for n in range(1, 12))
CHAIN = "l0: &l0 [x]\n" + "".join(f"l{n}: &l{n} [*l{n - 1}]\n" for n in range(1, 3000))
COPIES, LEVELS = f"more than {LARGEST_VALUE} values", f"more than {DEEPEST} levels"
HOSTILE = {
    "alias bomb of lists": (LISTS, 5, COPIES),
    "alias bomb of mappings": (MAPPINGS, 5, COPIES),
    "alias bomb of merge keys": (MERGES, 5, COPIES),
    "a long chain of aliases": (CHAIN, 51, LEVELS),
    "a list in itself": ("a: 1\nb: &b [1, *b]\n", 2, "*b inside of the value that &b names"),
    "a mapping in itself": ("a: &a\n  b: {c: *a}\n", 2, "*a inside of"),
    "a mapping merged into itself": ("a: &a\n  <<: *a\n", 2, "*a inside of"),
    "a key that contains itself": ("a: &a\n  ? [*a]\n  : 1\n", 2, "*a inside of"),
    "deep brackets": ("a: 1\nb: " + "[" * 100_000, 2, LEVELS),
    "deep braces": ("a: " + "{b: " * 100_000, 1, LEVELS),
    "deep dashes": ("a: 1\n" + "- " * 100_000, 2, ""),
    "deep lists": ("- " * 100_000, 1, LEVELS),
    "deep question marks": ("? " * 100_000, 1, LEVELS),
    "many values": ("a:\n" + "- 1\n" * 200_000, 9999, COPIES),
    "a long number": ("a: 1\nb: " + "7" * 5000, 2, "a number of 5000 characters"),
    "a long number in base 60": ("a: 1" + ":1" * 200_000, 1, "a number of 400001 characters"),
    "a number in base 60 that overflows": ("a: 1" + ":1" * 400 + ".5", 1, "is no float"),
    "an impossible date": ("a: 1\nb: 2020-13-45", 2, "'2020-13-45' is no timestamp (month must be"),
    "a bool that is none": ("a: !!bool 3", 1, "'3' is no bool"),
    "an escape beyond Unicode": ('a: "\\U00110000"', 1, "a character that does not exist"),
    "an escape beyond all numbers": ('a: "\\UFFFFFFFF"', 1, "a character that does not exist"),
    "half of a surrogate pair": ('a: 1\nb: "\\ud800"', 2, "half of a surrogate pair"),
    "an empty int": ("a: !!int ''", 1, "'' is no int"),
    "a text as a set": ("a: 1\nb: !!set x", 2, "expected a mapping node"),
    "a Python object": ("a: !!python/object/apply:os.system [ls]", 1, "could not determine a constructor"),
    "equal keys": ("a: 1\nb: {c: 1,\n  c: 2}", 3, "the key 'c' a second time (first in line 2)"),
    "equal numbers as keys": ("b: {1: x, 0x1: y}", 1, "the key '0x1' a second time"),
    "a second merge key": ("b: {<<: {a: 1}, <<: {c: 1}}", 1, "the key '<<' a second time"),
    "a list as a key": ("a: 1\n? [b]\n: 2", 2, "found unhashable key"),
    "an unknown alias": ("a: 1\nb: *c", 2, "undefined alias"),
    "two documents": ("a: 1\n---\nb: 2", 2, "expected a single document in the stream, but found another document"),
    "a control character": ("a: 1\nb: \x07", 2, "the character U+0007"),
    "an unclosed quote": ("a: 1\nb: 'c", 2, "unexpected end of stream"),
    "a tab": ("a: 1\n\tb: 2", 2, "'\\t'"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_error_that_names_the_line(tmp_path, name):
    text, line, problem = HOSTILE[name]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_config(path)
    message = str(error.value)
    assert message.startswith(f"{path}:{line}: expected valid YAML, got an error: ")
    assert problem in message
    assert len(message) < 500 + len(str(path))
    assert "\n" not in message


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "c.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no space
    with pytest.raises(InputError, match=rf"c.yaml: expected at most {4 * LARGEST_TEXT} bytes, got {1 << 40}$"):
        read_config(path)
    with pytest.raises(InputError, match=f"expected at most {LARGEST_TEXT} characters, got {LARGEST_TEXT + 1}$"):
        parse_yaml("x" * (LARGEST_TEXT + 1))


def test_what_is_within_the_limits_is_read():
    assert parse_yaml("x" * LARGEST_TEXT) == "x" * LARGEST_TEXT
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}")["b"] == {"x": 1, "y": 3}
    assert parse_yaml("[" * DEEPEST + "1" + "]" * DEEPEST) is not None
    assert len(parse_yaml("- 1\n" * (LARGEST_VALUE - 1))) == LARGEST_VALUE - 1
    assert parse_yaml("[0x1F, 1e3, 1.5, 2020-01-02, 1:30]")[0] == 31


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=" + "[" * 5000, "cwdpo: command line: seed: expected a YAML value, got '[[["),
        ("dpo.beta=&a [*a]", "cwdpo: command line: dpo.beta: expected a YAML value, got '&a [*a]'"),
        (f"seed=0x{'f' * 2000}", "a number of 2002 characters"),
        (f"seed=0x{'f' * 900}", "seed: expected an integer in [0, 4294967295]"),
        ("seed." + "a." * 5000 + "b=1", "expected at most 50 levels, got 5002"),
    ],
)
def test_hostile_overrides_are_one_line(settings, write_config, capsys, override, message):
    settings.pop("seed")
    assert main(["run", str(write_config(settings)), override]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 2500
