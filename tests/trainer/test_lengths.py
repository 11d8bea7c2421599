"""Measured lengths equal those of real batches; rows that are too long are trimmed, shrunk or skipped."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from cwdpo_kernels.integrations.hugging_face import attach_head, check_head
from cwdpo_trainer.cli import main
from cwdpo_trainer.config.arguments import DataArguments, SamplingArguments
from cwdpo_trainer.data.collator import PairCollator, with_answers
from cwdpo_trainer.data.images import FileImage
from cwdpo_trainer.data.lengths import LengthMeter, fit_rows
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.negatives.sampling import sample_answers

sys.path.insert(0, str(Path(__file__).parent))
from tiny_processors import PROCESSORS

# PaliGemma's processor makes labels (which the collator drops) in a way that numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def make_row(tmp_path):
    """A function that makes a row with images of the given sizes. Keyword arguments replace its answers or prompt."""
    count = iter(range(100))

    def make(*sizes: tuple[int, int], **changes) -> Row:
        index = next(count)
        images = []
        for number, size in enumerate(sizes):
            path = tmp_path / f"{index}_{number}.png"
            Image.new("RGB", size, (40 * index % 255, 9, 200)).save(path)
            images.append(FileImage(path))
        prompt = " ".join(["<image>"] * len(sizes) + ["describe"])
        values = {"prompt": prompt, "chosen": "a red square and a blue square", "rejected": "a red square"} | changes
        return Row(index, f"f:{index + 1}", images=tuple(images), references=("x",), negative_source="d", **values)

    return make


@pytest.fixture(scope="session")
def qwen() -> PairCollator:
    return PairCollator(PROCESSORS["qwen2_5_vl"]())


def real_length(collator: PairCollator, row: Row) -> int:
    pairs = collator([row])
    return with_answers(pairs["prompts"], pairs["chosen"], pairs["rejected"], pad_id=0).labels.shape[1]


def test_lengths_equal_those_of_the_batch_and_each_shape_is_processed_once(qwen, make_row, monkeypatch):
    rows = [make_row((32, 32)), make_row((32, 32)), make_row((40, 16), (8, 24)), make_row((40, 16)), make_row()]
    expected = [real_length(qwen, row) for row in rows]
    calls = []
    plain = Qwen2VLImageProcessorPil.__call__
    monkeypatch.setattr(
        Qwen2VLImageProcessorPil, "__call__", lambda self, *args, **kw: calls.append(1) or plain(self, *args, **kw)
    )
    meter = LengthMeter(qwen)
    lengths = [meter(row) for row in rows]
    assert [length.total for length in lengths] == expected
    assert lengths[0] == (16 + 1, 16, 8, 4)
    assert [length.image for length in lengths] == [16, 16, 10 + 8, 10, 0]  # 8 x 24 pixels grow to 16 x 32
    assert len(calls) == 1 + 3  # the first row also with its real image


@pytest.mark.parametrize("name", PROCESSORS)
def test_lengths_are_correct_for_every_processor_class(name, make_row):
    collator = PairCollator(PROCESSORS[name]())
    meter = LengthMeter(collator)
    for sizes in ([(8, 8)], [(40, 16)], [(40, 16), (8, 24)], [(64, 64)], [(40, 16)]):
        row = make_row(*sizes)
        length = meter(row)
        assert length.total == real_length(collator, row)
        assert length.image >= 4 * len(sizes)


def test_a_processor_that_depends_on_image_content_is_refused(qwen, make_row, tmp_path):
    class Cropping:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, images, **options):
            return self.inner([[image.crop(image.getbbox()) for image in of_row] for of_row in images], **options)

    processor = copy.copy(qwen.processor)
    processor.image_processor = Cropping(processor.image_processor)
    row = make_row((64, 64))
    image = Image.new("RGB", (64, 64))
    image.paste((255, 0, 0), (0, 0, 63, 40))
    image.save(row.images[0].path)
    with pytest.raises(
        InputError, match=r"f:1: prompt tokens of .*: expected .*, as with blank images of the same sizes"
    ):
        LengthMeter(PairCollator(processor))(row)


def test_rows_that_fit_are_unchanged(collator, make_row):
    row = make_row((8, 8))
    fit = fit_rows([row], LengthMeter(collator), 13, "trim")
    assert fit.rows == [row]
    assert fit.report("f", 13) == "f, max_length 13: all 1 rows fit"


def test_trimmed_answers_have_no_end_of_sequence(collator, make_row):
    """The prompt has 5 tokens, the answers have 8 and 4: only the longer one is cut."""
    meter = LengthMeter(collator)
    fit = fit_rows([make_row((8, 8))], meter, 11, "trim")
    pairs = collator(fit.rows)
    words = collator.tokenizer.convert_ids_to_tokens
    assert words(pairs["chosen"][0]) == ["a", "red", "square", "and", "a", "blue"]
    assert words(pairs["rejected"][0]) == ["a", "red", "square", "</s>"]
    assert real_length(collator, fit.rows[0]) == fit.lengths[0].total == 11
    assert (fit.lengths[0].prompt, fit.lengths[0].chosen, fit.lengths[0].rejected) == (5, 6, 4)
    assert fit.report("f", 11) == "f, max_length 11: 1 of 1 rows have trimmed answers (f:1)"


def test_rows_that_cannot_be_trimmed_are_skipped(collator, make_row):
    full, alike, good = make_row((8, 8), (8, 8)), make_row((8, 8)), make_row((8, 8), rejected="blue")
    fit = fit_rows([full, alike, good], LengthMeter(collator), 8, "trim")
    assert [row.id for row in fit.rows] == [good.id]
    assert fit.skipped == [full.where, alike.where]
    assert "2 of 3 rows are skipped (f:1, f:2)" in fit.report("f", 8)


def test_skip_removes_rows_that_are_too_long(collator, make_row):
    rows = [make_row((8, 8)), make_row((8, 8), chosen="a square")]
    fit = fit_rows(rows, LengthMeter(collator), 12, "skip")
    assert (fit.rows, fit.skipped) == ([rows[1]], ["f:1"])
    with pytest.raises(InputError, match=r"data.max_length: expected room for at least 1 row"):
        fit_rows(rows, LengthMeter(collator), 4, "skip")


@pytest.mark.parametrize("sizes", [[(80, 40)], [(80, 40), (16, 16)]])
def test_shrink_lowers_the_resolution_just_enough(qwen, make_row, sizes):
    row = make_row(*sizes)
    meter = LengthMeter(qwen)
    limit = meter(row).total - 10
    (smaller,) = fit_rows([row], meter, limit, "shrink").rows
    assert limit - 8 <= real_length(qwen, smaller) <= limit
    assert real_length(qwen, smaller) == meter(smaller).total
    pairs = qwen([smaller])
    assert [len(pairs[name][0]) for name in ("chosen", "rejected")] == [8, 4]  # complete, with end of sequence
    assert int((pairs["prompts"]["input_ids"] == qwen.processor.image_token_id).sum()) == meter(smaller).image
    small = [image.size for image in smaller.load_images()]
    assert small[0][0] / small[0][1] == pytest.approx(2, abs=0.1)
    assert small[1:] == sizes[1:]  # already within the budget


def test_shrink_skips_rows_that_cannot_be_small_enough(qwen, make_row):
    rows = [make_row((80, 40)), make_row(), make_row((16, 16))]
    meter = LengthMeter(qwen)
    fit = fit_rows([*rows, make_row((16, 16), chosen="a")], meter, 11, "shrink")
    assert (len(fit.rows), fit.skipped) == (2, ["f:1", "f:3"])  # the processor makes at least 4 tokens


def test_shrink_is_refused_if_image_size_does_not_matter(collator, make_row):
    expected = "data.over_length: expected trim or skip, as LlavaProcessor makes as many tokens .*f:1 has 13"
    with pytest.raises(InputError, match=expected):
        fit_rows([make_row((8, 8))], LengthMeter(collator), 12, "shrink")


def test_rows_with_different_numbers_of_images_share_a_batch(collator, model, make_row):
    """Each row has the same log-probs as in a batch of its own."""
    rows = [make_row((8, 8), (8, 8)), make_row((8, 8)), make_row()]
    attach_head(model)

    def logits(of_rows):
        pairs = collator(of_rows)
        inputs, labels = with_answers(pairs["prompts"], pairs["chosen"], pairs["rejected"], pad_id=0)
        check_head(model, inputs, labels)
        return model(**inputs).logits, labels

    with torch.no_grad():
        together, labels = logits(rows)
        for index, row in enumerate(rows):
            alone, own_labels = logits([row])
            for one, other in ((index, 0), (index + len(rows), 1)):
                expected = alone[other][own_labels[other] >= 0]
                torch.testing.assert_close(together[one][labels[one] >= 0], expected, rtol=1e-4, atol=1e-4)


def test_sampled_answers_are_cut_to_max_answer(collator, model, make_row):
    row = dataclasses.replace(make_row((8, 8)), max_answer=2)
    settings = SamplingArguments(samples=16, temperature=5.0, max_new_tokens=6)
    (drawn,) = sample_answers(model, collator, [row], settings, seed=0)
    assert drawn
    assert max(map(len, drawn)) == 2
    assert collator.answer_tokens(row, row.chosen)[0] not in drawn


def test_a_run_reports_trimmed_rows(settings, write_config, capsys):
    del settings["sft"]
    settings["dpo"] |= {"max_steps": 2, "eval_steps": 2}
    settings["data"] |= {"max_length": 9}  # prompts have 5 tokens, answers 4 or 6
    assert main(["run", str(write_config(settings))]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "max_length" in line]
    changes = [line.split(" (")[0].split(": ")[1] for line in lines]
    assert changes == ["16 of 32 rows have trimmed answers", "6 of 12 rows have trimmed answers"]


@pytest.mark.parametrize(("key", "value"), [("max_length", 1), ("over_length", "cut")])
def test_invalid_options_are_named(key, value):
    with pytest.raises(ValueError, match=f"{key}: expected"):
        DataArguments("a", "b", **{key: value})
