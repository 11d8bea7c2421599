"""Head sizes of published vision-language models, and the shapes of the GPU benchmarks. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """V and D from a published config.json, and the number of prompt tokens of a 640 x 480 image."""

    vocab: int
    dim: int
    image_tokens: int


MODELS = {
    "SmolVLM-256M": Model(49280, 576, 13 * 64),  # 4 x 3 crops of 512 x 512, and the whole image
    "Qwen2.5-VL-3B": Model(151936, 2048, 23 * 17),  # one token per 28 x 28 pixels
    "Qwen2.5-VL-7B": Model(152064, 3584, 23 * 17),
    "Qwen2.5-VL-72B": Model(152064, 8192, 23 * 17),
    "Gemma-3-4B": Model(262208, 2560, 256),
    "Llama-3.2-11B-Vision": Model(128256, 4096, 1),  # the image enters through cross-attention
}


@dataclass(frozen=True)
class Shape:
    """`tokens`: labeled tokens of all 2P answers."""

    name: str
    tokens: int
    vocab: int
    dim: int

    @classmethod
    def of(cls, model: str, tokens: int) -> Shape:
        return cls(model, tokens, MODELS[model].vocab, MODELS[model].dim)


SHAPES = [
    Shape("trl-issue-7244", 8192, 151936, 4096),  # the issue reports times of the peers on an H100
    Shape.of("Qwen2.5-VL-7B", 4096),
    Shape.of("SmolVLM-256M", 4096),
    Shape.of("Gemma-3-4B", 2048),
]
