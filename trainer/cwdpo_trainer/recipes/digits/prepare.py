"""Writes the digits task to a folder: a model, and preference pairs with images."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cwdpo_trainer.errors import require
from cwdpo_trainer.files import only_process, read_json, replacing_folder, write_json
from cwdpo_trainer.recipes.digits import model as model_file
from cwdpo_trainer.recipes.digits import scenes as scenes_file
from cwdpo_trainer.recipes.digits.model import build_model, build_processor, warm_up
from cwdpo_trainer.recipes.digits.scenes import (
    PROMPT,
    STYLES,
    Scene,
    captions,
    draw_scene,
    easy_negative,
    near_negative,
    split_handwriting,
)
from cwdpo_trainer.reporter import progress, say

STAMP = "recipe.json"
CONTENT = frozenset({"model", "images", "train.jsonl", "heldout.jsonl", STAMP})
NEGATIVE_SOURCES = ("near", "easy")
HELDOUT_SHARE = 0.2  # of the handwritten digits


@dataclass(frozen=True)
class _Settings:
    seed: int
    train_rows: int
    heldout_rows: int
    warmup_steps: int

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("train_rows", 2), ("heldout_rows", 2), ("warmup_steps", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(whole and value >= least, "config", f"prepare.{name}", f"an integer >= {least}", repr(value))
        even = self.heldout_rows % len(NEGATIVE_SOURCES) == 0
        expected = "an even number (a near and an easy row per scene)"
        require(even, "config", "prepare.heldout_rows", expected, self.heldout_rows)


def prepare(
    folder: Path,
    seed: int = 0,
    train_rows: int = 4000,
    heldout_rows: int = 512,
    warmup_steps: int = 250,
) -> None:
    """Write model/, train.jsonl, heldout.jsonl and images/ to `folder`. Returns at once if they are up to date.

    - `train_rows`: number of training pairs, >= 2. Each has a scene of its own, and a near or an easy negative with
      equal probability.
    - `heldout_rows`: number of held-out pairs, even. Each scene has a pair with a near and one with an easy negative.
      Its handwritten digits are not among the training digits.
    - `warmup_steps`: steps that train the LLaVA's vision tower to classify the cells of the training scenes.
    - `seed`: the same arguments give the same files.

    The folder is written atomically. A folder that this function wrote with other arguments is replaced. Of several
    processes one writes, and the others wait. Raises `InputError` for an argument out of range, and for a folder with
    other files.
    """
    folder = Path(folder)
    settings = _Settings(seed, train_rows, heldout_rows, warmup_steps)
    stamp = {"settings": asdict(settings), "code": _code_version()}
    if _is_stamped(folder, stamp):
        return
    with only_process(folder):
        if _is_stamped(folder, stamp):
            return  # by another process meanwhile
        say(f"digits: writing the dataset and the model to {folder}")
        with replacing_folder(folder) as unfinished:
            _write(unfinished, settings)
            write_json(unfinished / STAMP, stamp)
            if folder.exists():
                shutil.rmtree(folder)


def _is_stamped(folder: Path, stamp: dict[str, Any]) -> bool:
    """Whether `folder` has the content that `stamp` describes. Raises `InputError` if it has other files."""
    if not folder.exists():
        return False
    require(folder.is_dir(), str(folder), "", "a folder", "a file")
    found = {path.name for path in folder.iterdir()}
    foreign = sorted(found - CONTENT) if STAMP in found else sorted(found)
    expected = "an empty folder, or one that this recipe wrote"
    require(not foreign, str(folder), "", expected, f"one with {', '.join(foreign[:5])}")
    return found == CONTENT and read_json(folder / STAMP) == stamp


def _code_version() -> str:
    """A digest of the recipe's source files, so that a folder from an older version is rewritten."""
    files = [Path(__file__), Path(model_file.__file__), Path(scenes_file.__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _write(folder: Path, settings: _Settings) -> None:
    rng = random.Random(settings.seed)
    train_digits, heldout_digits = split_handwriting(HELDOUT_SHARE, rng)
    train = [draw_scene(train_digits, rng) for _ in range(settings.train_rows)]
    heldout = [draw_scene(heldout_digits, rng) for _ in range(settings.heldout_rows // len(NEGATIVE_SOURCES))]
    _write_rows(folder, "train", [(scene, (rng.choice(NEGATIVE_SOURCES),)) for scene in train], rng)
    _write_rows(folder, "heldout", [(scene, NEGATIVE_SOURCES) for scene in heldout], rng)
    processor = build_processor()
    # Keep the caller's random state: it must not depend on whether the folder existed.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = build_model(processor)
        warm_up(model, processor, train, settings.warmup_steps)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


def _write_rows(folder: Path, name: str, scenes: list[tuple[Scene, tuple[str, ...]]], rng: random.Random) -> None:
    """Write the image of each scene, and a line of `name`.jsonl for each of its sources of negatives."""
    (folder / "images" / name).mkdir(parents=True)
    lines = []
    for index, (scene, sources) in enumerate(progress(scenes, f"{name} scenes", unit="scene")):
        image = f"images/{name}/{index:05d}.png"
        Image.fromarray(scene.image).save(folder / image)
        lines += [json.dumps(_row(scene, source, image, rng)) + "\n" for source in sources]
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _row(scene: Scene, source: str, image: str, rng: random.Random) -> dict[str, Any]:
    style = rng.randrange(len(STYLES))
    references = captions(scene.cells)
    rejected = near_negative(scene.cells, style, rng) if source == "near" else easy_negative(rng)
    return {
        "prompt": PROMPT,
        "chosen": references[style],
        "rejected": rejected,
        "images": [image],
        "references": references,
        "negative_source": source,
    }
