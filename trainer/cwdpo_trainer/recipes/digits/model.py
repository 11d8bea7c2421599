"""A LLaVA with a third of a million parameters, its processor, and the warm-up of its vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from cwdpo_trainer.recipes.digits.scenes import CELL, EMPTY, SIZE, Scene, words
from cwdpo_trainer.reporter import progress

PAD, BOS, EOS, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_MAX_NEW_TOKENS = 16  # the longest caption has 11 tokens, end of sequence included
_WARMUP_BATCH = 64
_WARMUP_RATE = 3e-3


def build_processor() -> LlavaProcessor:
    """A processor with one token per word, a BOS token before each prompt, and images of 16 x 16 pixels."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE], model_max_length=64,
    )  # fmt: skip
    image_processor = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor, tokenizer, patch_size=CELL, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=IMAGE,
    )  # fmt: skip


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The model with random weights from torch's default generator. Each patch of its encoder is one cell."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            image_size=SIZE, patch_size=CELL, projection_dim=64,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
            initializer_range=0.05, **_special_ids(processor),
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE), vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(max_new_tokens=_MAX_NEW_TOKENS, **_special_ids(processor))
    return model


def warm_up(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, scenes: Sequence[Scene], steps: int
) -> None:
    """Train the vision tower to classify each cell (a digit or empty) from the features of its patch.

    It stands in for the pretrained encoder of a real vision-language model: with a random encoder, the language model
    needs several times as many steps. The classifier is discarded.
    """
    images = _pixels(processor, scenes)
    cells = torch.tensor([scene.cells for scene in scenes])
    tower = model.model.vision_tower.train()
    classifier = nn.Linear(tower.config.hidden_size, EMPTY + 1)
    parameters = [*tower.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_WARMUP_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _WARMUP_RATE, total_steps=max(steps, 1))
    for _ in progress(range(steps), "vision warm-up", unit="step"):
        batch = torch.randint(len(scenes), (_WARMUP_BATCH,))
        logits = classifier(patch_features(model, images[batch]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), cells[batch].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    model.zero_grad()


def patch_features(model: LlavaForConditionalGeneration, pixel_values: Tensor) -> Tensor:
    """Patch features [B, 4, hidden] of images [B, 3, 16, 16], before the projection to the language model."""
    return model.model.vision_tower(pixel_values).last_hidden_state[:, 1:]  # without the class token


def _pixels(processor: LlavaProcessor, scenes: Sequence[Scene]) -> Tensor:
    images = [Image.fromarray(scene.image) for scene in scenes]
    return processor.image_processor(images, return_tensors="pt")["pixel_values"]


def _special_ids(processor: LlavaProcessor) -> dict[str, Any]:
    return {name: getattr(processor.tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
