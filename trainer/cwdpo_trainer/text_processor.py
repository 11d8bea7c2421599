"""A tokenizer in the role of a processor, for models that read text only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


class TextProcessor:
    """What the trainer uses of a processor, made of a tokenizer alone. Prompts have no images."""

    image_token_ids: tuple[int, ...] = ()
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(
        self, text: Sequence[str], images: None, text_kwargs: dict[str, Any], return_tensors: str
    ) -> dict[str, Any]:
        # Token types are for encoders. Some tokenizers make them, and causal models refuse them or add embeddings.
        options = {**text_kwargs, "return_token_type_ids": False, "return_attention_mask": True}
        return dict(self.tokenizer(list(text), return_tensors=return_tensors, **options))

    def apply_chat_template(self, messages: Sequence[Message], **options: Any) -> str:
        """The messages as text. Their parts are joined, because templates of text-only models take texts."""
        return self.tokenizer.apply_chat_template([_joined(each) for each in messages], tokenize=False, **options)  # type: ignore[return-value]  # with tokenize=False it is text

    def to_dict(self) -> dict[str, Any]:
        """Settings that change what the model sees of a prompt: none."""
        return {}


def _joined(message: Message) -> Message:
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return {**message, "content": text}
