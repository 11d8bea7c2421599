"""Cached log-probs of the reference are read back bit for bit. Damaged files are detected."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from cwdpo_trainer.data.images import FileImage
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.models.reference_cache import (
    PairLogp,
    ReferenceCache,
    _checksum,
    fingerprint,
    image_keys,
    pair_key,
)


def some_pairs(seed: int, count: int = 4) -> dict[str, PairLogp]:
    values = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * -40
    return {pair_key([], [seed, index], [1], [2]): PairLogp(*pair) for index, pair in enumerate(values.tolist())}


def test_pairs_are_read_back_bit_for_bit(tmp_path):
    pairs = some_pairs(0) | {"tiny": PairLogp(float(np.float32(-1e-38)), -0.0)}
    first = ReferenceCache(tmp_path / "cache")
    assert first.get(["tiny"]) == [None]
    first.add(pairs)
    again = ReferenceCache(tmp_path / "cache")
    for cache in (first, again):
        assert cache.get([*pairs, "other"]) == [*pairs.values(), None]
    assert again.describe() == f"reference cache: 5 pairs, 1 KiB in {tmp_path / 'cache'}"
    assert len(list((tmp_path / "cache").iterdir())) == 1  # who adds nothing leaves no file


def test_processes_see_pairs_that_others_add(tmp_path):
    caches = [ReferenceCache(tmp_path) for _ in range(4)]

    def work(index):
        for seed in range(index, 200, 4):
            caches[index].add(some_pairs(seed))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    for cache in caches:
        for seed in range(200):
            pairs = some_pairs(seed)
            assert cache.get(list(pairs)) == list(pairs.values())


def damage(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_damage_anywhere_in_a_line_is_detected(tmp_path, capsys):
    cache = ReferenceCache(tmp_path)
    for seed in range(3):
        cache.add(some_pairs(seed, count=1))
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    offsets = range(len(lines[0]), len(lines[0]) + len(lines[1]) - 1)
    for offset in random.Random(0).sample(offsets, 20):
        path.write_bytes(content)
        damage(path, offset)
        known = ReferenceCache(tmp_path)
        found = [known.get(list(some_pairs(seed, count=1)))[0] for seed in range(3)]
        assert [pair is None for pair in found] == [False, True, False]
        assert set(capsys.readouterr().out.splitlines()) == {f"{path}: a line is damaged; its pairs are computed again"}


def test_an_incomplete_line_is_reported_and_other_files_are_read(tmp_path, capsys):
    ReferenceCache(tmp_path).add(some_pairs(0))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    cache = ReferenceCache(tmp_path)
    assert capsys.readouterr().out == f"{path}: the last line was cut off; its pairs are computed again\n"
    assert cache.get(list(some_pairs(0))) == [None] * 4
    cache.add(some_pairs(0))
    assert ReferenceCache(tmp_path).get(list(some_pairs(0))) == list(some_pairs(0).values())


def test_a_log_prob_that_is_nan_is_refused_with_the_files_name(tmp_path):
    """A line with the right checksum: an earlier version stored what a broken reference gave."""
    cache = ReferenceCache(tmp_path)
    broken = {"pair": PairLogp(-1.0, math.nan)}
    with pytest.raises(InputError, match=r"log-prob of a rejected answer under the reference: .* got nan"):
        cache.add(broken)
    cache.add({"pair": PairLogp(-1.0, -math.inf)})  # a masked token has probability 0
    payload = json.dumps(broken).encode()
    (path,) = tmp_path.iterdir()
    path.write_bytes(_checksum(payload) + b" " + payload + b"\n")
    with pytest.raises(InputError, match=f"{path}: log-prob of a rejected answer .*delete the file"):
        ReferenceCache(tmp_path)


def test_a_key_depends_on_images_prompt_and_answers():
    keys = {
        pair_key(*parts)
        for parts in [
            (["a"], [1, 2], [3], [4]),
            (["b"], [1, 2], [3], [4]),
            (["a", "b"], [1, 2], [3], [4]),
            (["a"], [1], [2, 3], [4]),
            (["a"], [1, 2], [4], [3]),
        ]
    }
    assert len(keys) == 5


def test_images_are_identified_by_bytes_and_pixel_limit(rows, tmp_path):
    copied = tmp_path / "copy.png"
    copied.write_bytes(rows[0].images[0].read_bytes())
    same = dataclasses.replace(rows[0], images=(FileImage(copied),))
    smaller = dataclasses.replace(rows[0], max_pixels=16)
    keys = [image_keys(row) for row in (rows[0], same, rows[1], smaller)]
    assert keys[0] == keys[1]
    assert len({tuple(key) for key in keys}) == 3


def test_a_fingerprint_depends_only_on_weights_settings_and_precision(model, collator, tmp_path):
    name = fingerprint(model, collator.processor, "weights")
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    for same in (loaded, copy.deepcopy(model)):
        assert fingerprint(same, collator.processor, "weights") == name
    others = {name, fingerprint(model, collator.processor, "bf16")}
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.view(torch.int32)[3, 5] ^= 1
    others.add(fingerprint(other, collator.processor, "weights"))
    others.add(fingerprint(copy.deepcopy(model).bfloat16(), collator.processor, "weights"))
    other = copy.deepcopy(model)
    other.config.text_config.rope_parameters["rope_theta"] = 5000.0
    others.add(fingerprint(other, collator.processor, "weights"))
    processor = copy.deepcopy(collator.processor)
    processor.image_processor.do_normalize = False
    others.add(fingerprint(model, processor, "weights"))
    assert len(others) == 6


def test_a_fingerprint_does_not_depend_on_special_tokens_that_training_aligns(model, collator):
    """`Trainer.train` sets them to the tokenizer's: older releases in the config, newer ones in its text config."""
    tokenizer = collator.tokenizer
    names = set()
    for pad, bos, eos in [(None, None, None), (tokenizer.pad_token_id, 1, 2), (tokenizer.pad_token_id, 1, [2, 7])]:
        for level in ("config", "text_config"):
            other = copy.deepcopy(model)
            config = other.config if level == "config" else other.config.text_config
            config.pad_token_id, config.bos_token_id, config.eos_token_id = pad, bos, eos
            names.add(fingerprint(other, collator.processor, "weights"))
    assert names == {fingerprint(model, collator.processor, "weights")}


def test_a_fingerprint_depends_on_a_pad_token_that_is_not_the_tokenizers(model, collator):
    """Gemma 4 reads the pad token's embedding at the positions of an image."""
    other = copy.deepcopy(model)
    other.config.text_config.pad_token_id = collator.tokenizer.pad_token_id + 1
    names = {fingerprint(reference, collator.processor, "weights") for reference in (model, other)}
    assert len(names) == 2
