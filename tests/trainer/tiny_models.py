"""Tiny random models of the common classes, each with one batch.

`CLASSES` maps a name to a function that returns (model, inputs): two sequences with one image each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

IMAGE, TEXT_TOKENS, VOCAB = 5, 7, 40  # image placeholder id; text tokens after the image; vocabulary size
Model = tuple[nn.Module, dict[str, Tensor]]
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def _ids(image_tokens: int, **before: int) -> Tensor:
    """[2, T]: BOS, the placeholders of an image, then random text."""
    text = torch.randint(10, VOCAB, (2, TEXT_TOKENS))
    image = torch.full((2, image_tokens), IMAGE)
    return torch.cat([torch.ones(2, 1, dtype=torch.long), image, text], 1)


def _inputs(image_tokens: int, **more: Tensor) -> dict[str, Tensor]:
    ids = _ids(image_tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def _build(kind: type, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():  # logits as large as a trained model's
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model


def llava() -> Model:
    vision = hf.CLIPVisionConfig(**VISION, image_size=8, patch_size=4, projection_dim=16)
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_index=IMAGE, vision_feature_layer=-1
    )
    return _build(hf.LlavaForConditionalGeneration, config), _inputs(4, pixel_values=torch.rand(2, 3, 8, 8))


def llava_onevision() -> Model:
    vision = hf.SiglipVisionConfig(**VISION, image_size=8, patch_size=4)
    config = hf.LlavaOnevisionConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_index=IMAGE, vision_feature_layer=-1,
        image_grid_pinpoints=[[8, 8]], vision_aspect_ratio="anyres_max_9",
    )  # fmt: skip
    # 4 patches of the whole image, 4 of its only tile, and a newline token after each of the tile's two rows.
    pixels = {"pixel_values": torch.rand(2, 2, 3, 8, 8), "image_sizes": torch.tensor([[8, 8], [8, 8]])}
    return _build(hf.LlavaOnevisionForConditionalGeneration, config), _inputs(10, **pixels)


def _grid(image_tokens: int, channels: int) -> dict[str, Tensor]:
    """Qwen's images: 4 x 4 patches each, four patches per token. Token types mark the image tokens."""
    inputs = _inputs(image_tokens)
    return inputs | {
        "pixel_values": torch.rand(2 * 16, channels),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long(),
    }


QWEN_IDS = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}


def qwen2_5_vl(tied: bool = False) -> Model:
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4], "rope_theta": 1e4}},
        vision_config={"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
                       "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
                       "fullatt_block_indexes": [1]},
        tie_word_embeddings=tied, **QWEN_IDS,
    )  # fmt: skip
    return _build(hf.Qwen2_5_VLForConditionalGeneration, config), _grid(4, 3 * 2 * 4 * 4)


def qwen3_vl() -> Model:
    config = hf.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}},
        vision_config={"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32,
                       "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
                       "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **QWEN_IDS,
    )  # fmt: skip
    return _build(hf.Qwen3VLForConditionalGeneration, config), _grid(4, 3 * 2 * 4 * 4)


def _idefics(kind: type, config_kind: type) -> Model:
    vision = {**VISION, "image_size": 8, "patch_size": 2}
    text = hf.LlamaConfig(**TEXT)
    config = config_kind(vision_config=vision, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)
    return _build(kind, config), _inputs(4, pixel_values=torch.rand(2, 1, 3, 8, 8))


def idefics3() -> Model:
    return _idefics(hf.Idefics3ForConditionalGeneration, hf.Idefics3Config)


def smolvlm() -> Model:
    return _idefics(hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig)


def internvl() -> Model:
    config = hf.InternVLConfig(
        vision_config={**VISION, "image_size": [8, 8], "patch_size": [2, 2]}, text_config=hf.Qwen2Config(**TEXT),
        image_token_id=IMAGE, downsample_ratio=0.5,
    )  # fmt: skip
    return _build(hf.InternVLForConditionalGeneration, config), _inputs(4, pixel_values=torch.rand(2, 3, 8, 8))


def gemma3() -> Model:
    config = hf.Gemma3Config(
        text_config={**TEXT, "head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 3.0},
        vision_config={**VISION, "image_size": 8, "patch_size": 2}, mm_tokens_per_image=4,
        image_token_index=IMAGE, boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    inputs = _inputs(4, pixel_values=torch.rand(2, 3, 8, 8))
    inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return _build(hf.Gemma3ForConditionalGeneration, config), inputs


def paligemma() -> Model:
    config = hf.PaliGemmaConfig(
        text_config={**TEXT, "head_dim": 16, "model_type": "gemma"},
        vision_config={**VISION, "image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model",
                       "projection_dim": 32, "vision_use_head": False},
        image_token_index=IMAGE, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    inputs = _inputs(4, pixel_values=torch.rand(2, 3, 8, 8))
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return _build(hf.PaliGemmaForConditionalGeneration, config), inputs


def cohere2_vision() -> Model:
    config = hf.Cohere2VisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=8, patch_size=2),
        text_config=hf.Cohere2Config(**TEXT, logit_scale=0.25, sliding_window=8),
        downsample_factor=2, image_token_id=IMAGE, alignment_intermediate_size=32,
    )  # fmt: skip
    return _build(hf.Cohere2VisionForConditionalGeneration, config), _inputs(4, pixel_values=torch.rand(2, 3, 8, 8))


def llama() -> Model:
    return _build(hf.LlamaForCausalLM, hf.LlamaConfig(**TEXT)), _inputs(0)


def qwen3() -> Model:
    """Text only, with norms of queries and keys."""
    return _build(hf.Qwen3ForCausalLM, hf.Qwen3Config(**TEXT, head_dim=16)), _inputs(0)


def gemma2() -> Model:
    """Text only, with a soft cap that its forward applies."""
    config = hf.Gemma2Config(**TEXT, head_dim=16, sliding_window=8, final_logit_softcapping=3.0)
    return _build(hf.Gemma2ForCausalLM, config), _inputs(0)


def cohere2() -> Model:
    """Text only, with a logit scale that its forward applies."""
    return _build(hf.Cohere2ForCausalLM, hf.Cohere2Config(**TEXT, logit_scale=0.25, sliding_window=8)), _inputs(0)


CLASSES: dict[str, Callable[[], Model]] = {
    function.__name__: function
    for function in (llava, llava_onevision, qwen2_5_vl, qwen3_vl, idefics3, smolvlm, internvl, gemma3, paligemma,
                     cohere2_vision, llama, qwen3, gemma2, cohere2)
}  # fmt: skip
