"""Models that are large enough for their activations to matter, with processors and pairs of long prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_processors
import tiny_text
import transformers as hf
from PIL import Image

from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.images import FileImage
from cwdpo_trainer.data.rows import Row

WORDS, ANSWER = 96, 16  # of a prompt after its image, and of an answer
TEXT: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip


def llava() -> tuple[Any, Any]:
    """196 tokens an image."""
    tokenizer = tiny_processors._tokenizer(image_token="<image>")
    size = {"height": 56, "width": 56}
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size=size, crop_size=size), tokenizer, patch_size=4, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", image_token="<image>",
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=4,
        projection_dim=128,
    )  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    return hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_index=image), processor


def qwen2_5_vl() -> tuple[Any, Any]:
    """49 tokens an image of 56 x 56 pixels, of 196 patches."""
    processor = tiny_processors.qwen2_5_vl()
    image, video = processor.tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4}
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={"depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 256, "out_hidden_size": 256,
                       "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 32,
                       "fullatt_block_indexes": [3]},
        image_token_id=image, video_token_id=video, vision_start_token_id=4000, vision_end_token_id=4001,
    )  # fmt: skip
    return config, processor


def llama() -> tuple[Any, Any]:
    """The head's weights are those of the token embeddings."""
    tokenizer = tiny_text.tokenizer(template=False)
    tokenizer.pad_token = tokenizer.eos_token
    return hf.LlamaConfig(**TEXT, tie_word_embeddings=True), tokenizer


def gemma3_text() -> tuple[Any, Any]:
    """Every second layer has a sliding window."""
    config = hf.Gemma3TextConfig(**{**TEXT, "num_hidden_layers": 12}, head_dim=64, sliding_window=64,
                                 layer_types=["sliding_attention", "full_attention"] * 6)  # fmt: skip
    return config, llama()[1]


def llama_12() -> tuple[Any, Any]:
    return hf.LlamaConfig(**{**TEXT, "num_hidden_layers": 12}), llama()[1]


TEXT_ONLY = {function.__name__: function for function in (llama, llama_12, gemma3_text)}
MODELS = {**TEXT_ONLY, **{function.__name__: function for function in (llava, qwen2_5_vl)}}


def save_config(name: str, folder: Path, pairs: int = 4) -> tuple[PairCollator, list[Row]]:
    """Write the config of a model to `folder`. Returns its collator and pairs."""
    config, processor = MODELS[name]()
    config.save_pretrained(folder)
    Image.new("RGB", (56, 56), (200, 30, 30)).save(folder / "image.png")
    images = () if name in TEXT_ONLY else (FileImage(folder / "image.png"),)
    start = "<image> " if images else ""
    rows = [
        Row(index, f"rows.jsonl:{index + 1}", start + "red " * (WORDS + 8 * index), "blue " * ANSWER,
            "square " * (ANSWER - 4), images, (), "near")
        for index in range(pairs)
    ]  # fmt: skip
    return PairCollator(processor), rows
