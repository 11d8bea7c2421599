"""Log-probs of the dataset's pairs under a frozen reference, stored on disk across runs.

    PATH/FINGERPRINT/*.jsonl

FINGERPRINT identifies everything that a log-prob depends on except the pair: the reference's weights and config, the
processor's settings and the precision (`fingerprint`). `pair_key` identifies a pair by the bytes of its images and the
tokens of its prompt and answers.

Each process appends to its own file. One write is one line: a checksum and all pairs of one forward. So no locks are
needed, a kill loses one line at most, and damaged lines are detected; their pairs are computed again. Values are
float32 sums, which their decimal text reproduces exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cwdpo_trainer import pixels
from cwdpo_trainer.data.collator import Tokens
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.errors import InputError, require
from cwdpo_trainer.models.reference import Reference, describe_reference
from cwdpo_trainer.reporter import say

# Settings that no log-prob depends on. Most differ between a model in memory and the same model loaded from a file.
# `Trainer.train` sets the ids of BOS and EOS to the tokenizer's; they matter for generation only.
_VOLATILE = {
    "_name_or_path", "architectures", "base_model_name_or_path", "bos_token_id", "dtype", "eos_token_id",
    "inference_mode", "peft_version", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


class PairLogp(NamedTuple):
    """Total log-probs of a pair's answers under the reference, in nats."""

    chosen: float
    rejected: float


class ReferenceCache:
    """The pairs stored in `folder`, including those that other processes add later."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pairs: dict[str, PairLogp] = {}
        self._read_up_to: dict[Path, int] = {}
        self._own = folder / f"{uuid.uuid4().hex}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._refresh()
        for path, end in self._read_up_to.items():
            if path.stat().st_size > end:
                say(f"{path}: the last line was cut off; its pairs are computed again")

    def __len__(self) -> int:
        return len(self._pairs)

    def describe(self) -> str:
        """Number of pairs, size and folder, on one line."""
        size = sum(path.stat().st_size for path in self.folder.glob("*.jsonl"))
        return f"reference cache: {len(self)} pairs, {-(-size // 1024):,} KiB in {self.folder}"

    def get(self, keys: Sequence[str]) -> list[PairLogp | None]:
        """The log-probs of each pair; None if they are not stored."""
        if not all(key in self._pairs for key in keys):
            self._refresh()
        return [self._pairs.get(key) for key in keys]

    def add(self, pairs: Mapping[str, PairLogp]) -> None:
        """Store the pairs of one forward. They are in the file when this returns.

        Raises `InputError` about a log-prob that is NaN: the reference is broken.
        """
        for pair in pairs.values():
            _check_numbers(str(self.folder), pair, "look for NaN in the model that the stage starts from")
        self._pairs.update(pairs)
        payload = json.dumps(pairs).encode()
        line = _checksum(payload) + b" " + payload + b"\n"
        with self._own.open("ab", buffering=0) as file:
            written = file.write(line)
        if written != len(line):
            expected = f"free space to write {len(line)} bytes (then run the same command again)"
            raise InputError(str(self._own), "", expected, f"{written} bytes written")

    def _refresh(self) -> None:
        """Read the lines that other processes have added since the last call."""
        for path in sorted(self.folder.glob("*.jsonl")):
            if path == self._own:
                continue
            start = self._read_up_to.setdefault(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                lines, newline, _ = file.read().rpartition(b"\n")  # the last line may be incomplete
            self._read_up_to[path] = start + len(lines) + len(newline)
            for line in lines.splitlines():
                self._add_line(path, line)

    def _add_line(self, path: Path, line: bytes) -> None:
        checksum, _, payload = line.partition(b" ")
        if checksum != _checksum(payload):
            say(f"{path}: a line is damaged; its pairs are computed again")
            return
        for key, values in json.loads(payload).items():
            pair = PairLogp(*values)
            _check_numbers(str(path), pair, "delete the file, and its pairs are computed again")
            self._pairs.setdefault(key, pair)


def _check_numbers(where: str, pair: PairLogp, advice: str) -> None:
    for name, value in pair._asdict().items():
        expected = f"a number ({advice})"
        require(not math.isnan(value), where, f"log-prob of a {name} answer under the reference", expected, value)


def _checksum(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=16).hexdigest().encode()


def image_keys(row: Row) -> list[str]:
    """Identify a row's images, as the processor receives them, by their bytes, the decoder and their pixel limit."""
    decoder = f"{pixels.VERSION} {row.max_pixels}"
    return [f"{hashlib.sha256(image.read_bytes()).hexdigest()} {decoder}" for image in row.images]


def pair_key(images: Sequence[str], prompt: Tokens, chosen: Tokens, rejected: Tokens) -> str:
    """Identify a pair, in 128 bits, by its `image_keys` and tokens."""
    content = json.dumps([images, prompt, chosen, rejected]).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def fingerprint(reference: Reference, processor: Any, precision: str) -> str:
    """Identify a reference, in 128 bits, by the bytes of its weights, its settings, the processor's settings and the
    `precision` it is computed in. Reads every weight once (1 to 2 GB/s on one core)."""
    settings, weights = describe_reference(reference)
    pad_id = processor.tokenizer.pad_token_id
    settings |= {"processor": processor.to_dict(), "precision": precision, "pad": pad_id}
    digest = hashlib.sha256(json.dumps(_stable(settings, pad_id), sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _stable(value: Any, pad_id: int) -> Any:
    """The settings without those that change when a model is trained, or saved and loaded again; sets are sorted.

    `Trainer.train` sets a config's pad token to the tokenizer's, `pad_id`. So none and `pad_id` are the same. Another
    one is kept, because Gemma 4 computes with it.
    """
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key not in _VOLATILE}
        if kept.get("pad_token_id") in (None, pad_id):
            kept.pop("pad_token_id", None)
        return {key: _stable(item, pad_id) for key, item in kept.items()}
    return sorted(value) if isinstance(value, set) else value
