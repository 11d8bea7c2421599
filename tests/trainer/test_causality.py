"""Answers do not attend to later tokens. PaliGemma would, if token types marked its answers as part of the prompt."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers as hf
from PIL import Image

from cwdpo_kernels.integrations.hugging_face import attach_head, check_head
from cwdpo_trainer.data.collator import PairCollator, with_answers
from cwdpo_trainer.data.images import FileImage
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.models.forward_checks import check_causal

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import TEXT, VISION
from tiny_processors import PROCESSORS

# PaliGemma's processor makes labels (which are dropped) in a way that numpy will refuse one day.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def paligemma(tmp_path):
    """(model, collator, pairs), with two rows."""
    collator = PairCollator(PROCESSORS["paligemma"]())
    tokenizer = collator.tokenizer
    config = hf.PaliGemmaConfig(
        text_config={**TEXT, "vocab_size": len(tokenizer), "head_dim": 16, "model_type": "gemma"},
        vision_config={**VISION, "image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model",
                       "projection_dim": 32, "vision_use_head": False},
        image_token_index=collator.processor.image_token_id, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    model = hf.PaliGemmaForConditionalGeneration(config)
    model.get_output_embeddings().weight.data.normal_(std=0.5)
    attach_head(model)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    image = FileImage(tmp_path / "red.png")
    rows = [Row(0, "f:1", "<image> describe", chosen, "blue", (image,), ("x",), "d") for chosen in ("a red", "red")]
    return model, collator, collator(rows)


def test_the_prompt_is_a_prefix_and_the_answer_its_suffix(paligemma):
    model, collator, pairs = paligemma
    assert "labels" not in pairs["prompts"]
    batch = collator.join(pairs["prompts"], pairs["chosen"], pairs["rejected"])
    types, answers = batch.inputs["token_type_ids"], (batch.labels >= 0).sum(dim=1)
    assert types.sum(dim=1).tolist() == answers.tolist() == [3, 2, 2, 2]
    assert check_head(model, *batch) < 1e-4
    assert check_causal(model, *batch) < 1e-4


def test_a_bidirectional_model_is_refused(paligemma):
    model, _, pairs = paligemma
    batch = with_answers(pairs["prompts"], pairs["chosen"], pairs["rejected"], pad_id=0)
    assert check_head(model, *batch) < 1e-4  # this check cannot detect it
    model.train()
    with pytest.raises(
        InputError, match=r"PaliGemma.*: log-probs of answers: expected a change <= .* attends to later tokens"
    ):
        check_causal(model, *batch)
    assert model.training


def test_a_causal_model_passes(model, collator, rows):
    attach_head(model)
    pairs = collator(rows[:3])
    assert check_causal(model, *collator.join(pairs["prompts"], pairs["chosen"], pairs["rejected"])) < 1e-4
