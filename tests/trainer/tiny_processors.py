"""Processors of the common model classes, with a vocabulary of a few words and images of a few pixels.

`PROCESSORS` maps a name to a function that returns a processor. None of them needs files or torchvision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.gemma3 import Gemma3Processor
from transformers.models.idefics3 import Idefics3Processor
from transformers.models.internvl import InternVLProcessor
from transformers.models.llava_onevision import LlavaOnevisionProcessor
from transformers.models.paligemma import PaliGemmaProcessor
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor

WORDS = ["<pad>", "</s>", "<bos>", "<unk>", "a", "red", "blue", "square", "and", "describe"]
SQUARE = {"height": 8, "width": 8}


def _tokenizer(**special: str) -> hf.PreTrainedTokenizerFast:
    """A tokenizer of `WORDS` and named special tokens, such as image_token="<image>"."""
    words = [*WORDS, *special.values()]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<bos>", unk_token="<unk>",
        extra_special_tokens=special,
    )  # fmt: skip


def _without_videos(kind: type, **parts: Any) -> Any:
    """A processor without a video processor, which would need torchvision. transformers insists on one otherwise."""

    class WithoutVideos(kind):
        def check_argument_for_proper_class(self, name: str, part: Any) -> Any:
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, part)

    return WithoutVideos(video_processor=None, **parts)


def qwen2_5_vl() -> Any:
    """Patches of 4 x 4 pixels, four patches per token: 8 x 8 pixels per token, 4 to 100 tokens per image."""
    size = {"shortest_edge": 4 * 64, "longest_edge": 100 * 64}
    image_processor = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
    tokenizer = _tokenizer(image_token="<image>", video_token="<video>")
    return _without_videos(Qwen2_5_VLProcessor, image_processor=image_processor, tokenizer=tokenizer)


def paligemma() -> Any:
    image_processor = hf.SiglipImageProcessorPil(size=SQUARE)
    image_processor.image_seq_length = 4
    return PaliGemmaProcessor(image_processor, _tokenizer(image_token="<image>"))


def gemma3() -> Any:
    tokenizer = _tokenizer(image_token="<soft>", boi_token="<image>", eoi_token="<end>")
    return Gemma3Processor(hf.Gemma3ImageProcessorPil(size=SQUARE), tokenizer, image_seq_length=4)


def idefics3() -> Any:
    image_processor = hf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 8})
    return Idefics3Processor(image_processor, _tokenizer(), image_seq_len=4)


def llava_onevision() -> Any:
    image_processor = hf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=[[8, 8], [8, 16], [16, 16]])
    tokenizer = _tokenizer(image_token="<image>", video_token="<video>")
    return _without_videos(
        LlavaOnevisionProcessor, image_processor=image_processor, tokenizer=tokenizer, num_image_tokens=4,
        vision_feature_select_strategy="full",
    )  # fmt: skip


def internvl() -> Any:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>"}
    image_processor = hf.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=6)
    tokenizer = _tokenizer(**names, video_token="<video>")
    return _without_videos(InternVLProcessor, image_processor=image_processor, tokenizer=tokenizer, image_seq_length=4)


PROCESSORS: dict[str, Callable[[], Any]] = {
    function.__name__: function for function in (qwen2_5_vl, paligemma, gemma3, idefics3, llava_onevision, internvl)
}
