"""Log-probs of the data set's pairs under a frozen reference, kept on disk from run to run.

    PATH/FINGERPRINT/*.jsonl

FINGERPRINT stands for all that a log-prob depends on beside the pair itself: the reference's weights and
configuration, the processor's settings and the precision of the computation (`fingerprint`). A pair is known by
its images' bytes and the tokens of prompt and answers (`pair_key`).

Each process appends to a file of its own, in one write a line with all pairs of one forward and their checksum:
nothing is locked, a kill costs at most the line that it cuts, and a line that was damaged later is found. Its
pairs are computed again. Values are float32 sums; text gives them back bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import ProcessorMixin

from cwdpo_trainer.data.collator import Tokens
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.models.loading import describe_reference

# Of the settings: what differs between a model in memory and the same one loaded from a file.
_VOLATILE = {
    "_name_or_path", "architectures", "base_model_name_or_path", "dtype", "inference_mode", "peft_version",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
_log = logging.getLogger(__name__)


class PairLogp(NamedTuple):
    """Total log-probs of a pair's answers under the reference, in nats."""

    chosen: float
    rejected: float


class ReferenceCache:
    """The pairs in `folder`, those that other processes add to it meanwhile included."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pairs: dict[str, PairLogp] = {}
        self._read_up_to: dict[Path, int] = {}
        self._own = folder / f"{uuid.uuid4().hex}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._refresh()
        for path, end in self._read_up_to.items():
            if path.stat().st_size > end:
                _log.warning("%s: the last line was cut off, its pairs are computed again", path)

    def __len__(self) -> int:
        return len(self._pairs)

    def describe(self) -> str:
        """How much there is, and where."""
        size = sum(path.stat().st_size for path in self.folder.glob("*.jsonl"))
        return f"reference cache: {len(self)} pairs, {-(-size // 1024):,} KiB in {self.folder}"

    def get(self, keys: Sequence[str]) -> list[PairLogp | None]:
        """The log-probs of each pair, None where they are not known."""
        if not all(key in self._pairs for key in keys):
            self._refresh()
        return [self._pairs.get(key) for key in keys]

    def add(self, pairs: Mapping[str, PairLogp]) -> None:
        """Keep what one forward computed; it is on disk when this returns."""
        self._pairs.update(pairs)
        payload = json.dumps(pairs).encode()
        line = _checksum(payload) + b" " + payload + b"\n"
        with self._own.open("ab", buffering=0) as file:
            written = file.write(line)
        if written != len(line):
            raise OSError(f"{self._own}: expected to write {len(line)} bytes, wrote {written}: the disk is full")

    def _refresh(self) -> None:
        """Read the lines that were added to the others' files since the last time."""
        for path in sorted(self.folder.glob("*.jsonl")):
            if path == self._own:
                continue
            start = self._read_up_to.setdefault(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                lines, newline, _ = file.read().rpartition(b"\n")  # a line without its end may still grow
            self._read_up_to[path] = start + len(lines) + len(newline)
            for line in lines.splitlines():
                self._take(path, line)

    def _take(self, path: Path, line: bytes) -> None:
        checksum, _, payload = line.partition(b" ")
        if checksum != _checksum(payload):
            _log.warning("%s: a line is damaged, its pairs are computed again", path)
            return
        for key, pair in json.loads(payload).items():
            self._pairs.setdefault(key, PairLogp(*pair))


def _checksum(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=16).hexdigest().encode()


def image_keys(row: Row) -> list[str]:
    """Names of a row's images as the processor gets them: by their bytes and the pixels that they may have."""
    return [f"{hashlib.sha256(image.read_bytes()).hexdigest()} {row.max_pixels}" for image in row.images]


def pair_key(images: Sequence[str], prompt: Tokens, chosen: Tokens, rejected: Tokens) -> str:
    """The name of a pair, 128 bits, from `image_keys` and tokens."""
    word = json.dumps([images, prompt, chosen, rejected]).encode()
    return hashlib.blake2b(word, digest_size=16).hexdigest()


def fingerprint(reference: nn.Module, processor: ProcessorMixin, precision: str) -> str:
    """The name of a reference, 128 bits: of the bytes of its weights, its settings, those of the processor, and
    `precision`, what it is computed in. Reads every weight once (1 to 2 GB/s on one core)."""
    settings, weights = describe_reference(reference)
    settings |= {"processor": processor.to_dict(), "precision": precision}
    word = hashlib.sha256(json.dumps(_lasting(settings), sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        word.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        word.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return word.hexdigest()[:32]


def _lasting(value: Any) -> Any:
    """Settings in an order, without those that change when a model is saved and loaded again."""
    if isinstance(value, dict):
        return {key: _lasting(item) for key, item in value.items() if key not in _VOLATILE}
    return sorted(value) if isinstance(value, set) else value
