"""Digests of what a run depends on, so that it does not resume with other data, images or models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from cwdpo_trainer.data.digests import image_digests
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.errors import InputError, describe
from cwdpo_trainer.files import sha256_of_all
from cwdpo_trainer.models.adapters import ADAPTER_FILE, existing_base

# Of weights, configs, tokenizers, chat templates and code. Logs and pictures in the same folder do not matter.
SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}


def input_digests(
    data: Mapping[str, str], rows: Mapping[str, Sequence[Row]], model: str, adapter: str | None
) -> dict[str, Any]:
    """Digests for run.json: `data` of the datasets, and those of the images in `rows`, of a model and of an adapter.

    Reads every image and every file of the models once.
    """
    return {
        "data": dict(data),
        "images": {name: image_digests(of_dataset) for name, of_dataset in rows.items()},
        "model": model_digests(model),
        "adapter": {} if adapter is None else model_digests(adapter),
    }


def model_digests(path: str) -> dict[str, str]:
    """The SHA-256 of each file that the model at `path` is loaded from, by its name; of a model on the Hub, the commit.

    Those of an adapter include its base model, under "base/". Reads every file once.
    """
    folder = Path(path)
    if not folder.is_dir():
        return {"commit": _commit(path)}
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in SUFFIXES]
    files += sorted(folder.glob("additional_chat_templates/*.jinja"))
    names = [file.relative_to(folder).as_posix() for file in files]
    digests = dict(zip(names, sha256_of_all(files), strict=True))
    base = existing_base(path)
    of_base = {} if base == path else model_digests(base)
    return digests | {f"base/{name}": digest for name, digest in of_base.items()}


def _commit(name: str) -> str:
    """The commit of a model on the Hub that `from_pretrained` loads now."""
    problem = "neither config.json nor adapter_config.json"
    for file in ("config.json", ADAPTER_FILE):
        try:
            found = cached_file(name, file)
        except OSError as error:
            problem = describe(error)
            continue
        commit = extract_commit_hash(found, None)
        if commit is not None:
            return commit
    raise InputError(name, "", "a model folder, or a model on the Hub or in its cache", problem)
