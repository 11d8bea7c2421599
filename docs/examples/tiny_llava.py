"""A LLaVA with 30 thousand random weights, its processor, and preference pairs about colored squares. No download.

Examples and tests use it instead of `AutoModelForImageTextToText.from_pretrained(...)` and your data.
"""

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = [*SPECIAL, *COLORS, "describe", "a", "square", "and", "left", "above"]


def tiny_llava() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    image_token = WORDS.index("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_layer=-1)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config), tiny_processor()


def tiny_processor() -> LlavaProcessor:
    vocabulary = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    images = CLIPImageProcessorPil(
        size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8}, do_center_crop=False
    )
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>",
    )  # fmt: skip


def color_pairs(count: int) -> list[dict]:
    """Rows in TRL's layout. Every second rejected answer is close (another color), the others are random words."""
    names = list(COLORS)
    rows = []
    for index in range(count):
        color, other = names[index % 3], names[(index + 1) % 3]
        image = Image.new("RGB", (8, 8), COLORS[color])
        image.putpixel((index % 8, index // 8 % 8), (255, 255, 255))  # makes every image different
        rejected = f" a {other} square </s>" if index % 2 else " and above left and </s>"
        rows.append(
            {
                "images": [image],
                "prompt": "<s> <image> describe",
                "chosen": f" a {color} square </s>",
                "rejected": rejected,
            }
        )
    return rows
