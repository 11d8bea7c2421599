"""Errors of the trainer: fields, and the message that they are rendered to."""

from __future__ import annotations

import pickle

import pytest
from torch.utils.data import DataLoader

from cwdpo_trainer.errors import InputError, InputErrors, describe, require, shorten


def test_fields_are_rendered_to_one_line():
    assert str(InputError("a.jsonl:3", "chosen", "text", 5)) == "a.jsonl:3: chosen: expected text, got 5"
    assert str(InputError("a.jsonl:3", "", "valid JSON", "x")) == "a.jsonl:3: expected valid JSON, got x"
    assert InputError("a.jsonl:3", "chosen", "text", 5).mismatch == "expected text, got 5"
    assert str(InputError("a.jsonl", "", "", "no such file")) == "a.jsonl: no such file"
    assert InputError("a.jsonl", "", "", "no such file").mismatch == "no such file"
    assert InputError("a.jsonl: no such file").mismatch == str(InputError("a.jsonl: no such file"))


def test_several_errors_are_a_list():
    errors = [InputError(f"a.jsonl:{line}", "", "valid JSON", "x") for line in (1, 2, 3)]
    assert str(InputErrors("a.jsonl: 3 errors", errors)).count("\n  ") == 3
    text = str(InputErrors("a.jsonl: 3 errors", errors, shown=1))
    assert text == "a.jsonl: 3 errors; the first 1:\n  a.jsonl:1: expected valid JSON, got x"
    with pytest.raises(InputError):
        raise InputErrors("a.jsonl: 3 errors", errors)


def test_require_raises_unless_the_condition_holds():
    require(True, "a", "b", "c", "d")
    with pytest.raises(InputError, match="a: b: expected c, got d"):
        require(False, "a", "b", "c", "d")


def test_an_error_survives_pickling():
    error = pickle.loads(pickle.dumps(InputError("a", "b", "c", "d")))
    assert (error.where, error.what, error.expected, error.got) == ("a", "b", "c", "d")


class Broken:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise InputError("a", "b", "c", "d")


def test_a_data_loader_raises_the_error_of_its_worker():
    with pytest.raises(InputError, match="a: b: expected c, got d"):
        list(DataLoader(Broken(), num_workers=1))


def test_long_texts_are_one_short_line():
    assert shorten("a\n  b") == "a b"
    assert shorten("x" * 50, limit=10) == "xxxxxxx..."
    assert describe(KeyError("gone")) == "KeyError: 'gone'"
