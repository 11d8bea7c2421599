"""One error for whatever goes wrong when the files of a model are read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig

from cwdpo_trainer.errors import InputError, describe, require
from cwdpo_trainer.files import read_json

CONFIG_FILE = "config.json"


@contextlib.contextmanager
def loading(path: str, expected: str) -> Iterator[None]:
    """Turn what a library raises about the model at `path` into an `InputError` that names the file, if one is damaged.

    `path`: a folder, or a name on the Hub. `expected`: what should have been there.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files raise any type
        folder = Path(path)
        if folder.is_dir():
            _check_files(folder)
        raise InputError(path, "", expected, describe(error)) from error


def _check_files(folder: Path) -> None:
    """Raise `InputError` about the first file that is damaged."""
    for file in sorted(folder.glob("*.json")):
        value = read_json(file)
        require(isinstance(value, dict | list), str(file), "", "a JSON object", json.dumps(value)[:50])
        # A vocabulary may be a list; settings are not.
        require(isinstance(value, dict) or "config" not in file.name, str(file), "", "a JSON object", "a list")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except Exception as error:  # SafetensorError, OSError
            raise InputError(str(file), "", "a whole safetensors file", describe(error)) from error
    if (folder / CONFIG_FILE).is_file():
        try:
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of a value with a wrong type
            raise InputError(str(folder / CONFIG_FILE), "", "the config of a model", describe(error)) from error
