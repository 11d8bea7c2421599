"""Answers are tokenized as they stand after their prompts, whatever the tokenizer adds to a text alone."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cwdpo_trainer.data.collator import PairCollator
from cwdpo_trainer.data.lengths import LengthMeter
from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.negatives.sampling import wrong_answers
from cwdpo_trainer.preflight.row_rules import doubled_special_token, same_tokens

sys.path.insert(0, str(Path(__file__).parent))
from tiny_processors import PROCESSORS

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
PROMPT = "USER: describe ASSISTANT:\n"


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def pieces() -> models.BPE:
    """SentencePiece's way: "▁" is a space, and merges make "▁a", "▁red" and "red"."""
    letters = sorted(set("▁\nUSERdescribASSISTANT:ared bluesq"))
    merges = [("r", "e"), ("re", "d"), ("▁", "a"), ("▁", "red")]
    tokens = [*SPECIAL, *letters, *("".join(pair) for pair in merges)]
    return models.BPE({token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges, unk_token="<unk>")


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(pieces())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    return fast(backend)


def prepend() -> PreTrainedTokenizerFast:
    """As in Llama's legacy tokenizer files."""
    backend = Tokenizer(pieces())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return fast(backend)


def unigram() -> PreTrainedTokenizerFast:
    """As in T5's and Gemma's SentencePiece models: the likeliest pieces, not merges."""
    letters = sorted(set("▁\nUSERdescribASSISTANT:ared bluesq."))
    scores = [(token, 0.0) for token in SPECIAL] + [(letter, -9.0) for letter in letters]
    scores += [("▁a", -2.0), ("▁red", -3.0), ("red", -4.0), ("▁describe", -3.0), ("ea", -10.0)]
    backend = Tokenizer(models.Unigram(scores, unk_id=SPECIAL.index("<unk>")))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return fast(backend)


def byte_level(add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    merges = [("r", "e"), ("re", "d"), ("Ġ", "a"), ("Ġ", "red"), ("Ċ", "Ċ"), ("r", "r")]
    tokens = [*SPECIAL, *sorted(alphabet), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return fast(backend)


TOKENIZERS = {
    "Metaspace, always": lambda: metaspace("always"),
    "Metaspace, first": lambda: metaspace("first"),
    "Metaspace, never": lambda: metaspace("never"),
    "Prepend": prepend,
    "Unigram": unigram,
    "byte-level BPE": byte_level,
    "byte-level BPE, prefix space": lambda: byte_level(add_prefix_space=True),
}


@pytest.fixture
def with_tokenizer(collator):
    """A function that returns a collator with another tokenizer."""

    def make(tokenizer: PreTrainedTokenizerFast) -> PairCollator:
        processor = copy.copy(collator.processor)
        processor.tokenizer = tokenizer
        return PairCollator(processor)

    return make


def row(prompt: str = PROMPT, chosen: str = "a red", rejected: str = "a blue", **limits) -> Row:
    return Row(0, "pairs.jsonl:7", prompt, chosen, rejected, (), ("x",), "d", **limits)


@pytest.mark.parametrize("answer", ["a red", " a red", "red", "\nred", ".", "a  red "])
@pytest.mark.parametrize("prompt", [PROMPT, "USER: describe", "describe.", "<image>", "a red <image> "])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompt_and_answer_are_the_tokens_of_their_text(name, prompt, answer, with_tokenizer):
    """Joined, they are the tokens of the whole text. Where a token would cross the boundary, they decode to it."""
    tokenizer = TOKENIZERS[name]()
    before, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt + answer))
    (tokens,) = with_tokenizer(tokenizer).answer_tokens(row(prompt), answer)
    assert tokens[-1] == tokenizer.eos_token_id
    joined = before + tokens[:-1]
    if whole[: len(before)] == before:
        assert joined == whole
    else:
        assert tokenizer.decode(joined) == tokenizer.decode(whole)


def test_a_sentencepiece_answer_has_no_space_of_its_own(with_tokenizer):
    for name in ("Metaspace, always", "Metaspace, first", "Prepend"):
        tokenizer = TOKENIZERS[name]()
        collator = with_tokenizer(tokenizer)
        words = tokenizer.convert_ids_to_tokens(collator.answer_tokens(row(), "a red")[0])
        assert words == ["a", "▁red", "</s>"]
        assert LengthMeter(collator).measure(row()).chosen == 3
        (pair,) = [collator([row()])]
        assert pair["chosen"] == [tokenizer.convert_tokens_to_ids(words)]
        assert wrong_answers(collator, [row()], [[pair["chosen"][0]]]) == [[]]  # the chosen answer is no negative


def test_a_token_across_the_boundary_is_split_there_and_said_once(with_tokenizer, capsys):
    tokenizer = byte_level()
    collator = with_tokenizer(tokenizer)
    for prompt, answer, expected in (
        ("describe ", "a red", ["a", "Ġred"]),
        ("describe\n", "\nred", ["Ċ", "red"]),
        ("r", "red", ["red"]),
        ("r", "ed", ["e", "d"]),
    ):
        words = tokenizer.convert_ids_to_tokens(collator.answer_tokens(row(prompt), answer)[0])
        assert words == [*expected, "</s>"]
    printed = capsys.readouterr().out
    assert printed.count("pairs.jsonl:7: the end of the prompt 'describe ' and the start of the answer 'a red'") == 1
    assert printed.count("pairs.jsonl:7") == 1
    LengthMeter(collator).measure(row("r", "red", "r"))
    assert capsys.readouterr().out == ""  # nor from the meter of the same collator


def test_words_that_only_spaces_separate_need_no_notice(collator, capsys):
    """A WordLevel tokenizer does not know "describea". Answers alone and in place have the same tokens."""
    (words,) = collator.answer_tokens(row("describe", "a red", "blue"), "a red")
    assert collator.tokenizer.convert_ids_to_tokens(words) == ["a", "red", "</s>"]
    assert capsys.readouterr().out == ""


def test_answers_follow_what_the_processor_adds_to_the_prompt(capsys):
    """PaliGemma's adds a newline, which shares a token with newlines at the start of the answer."""
    processor = PROCESSORS["paligemma"]()
    processor.tokenizer = byte_level()
    (tokens,) = PairCollator(processor).answer_tokens(row("describe"), "\n\nred")
    assert processor.tokenizer.convert_ids_to_tokens(tokens) == ["Ċ", "Ċ", "red", "</s>"]
    assert "the end of the prompt 'describe\\n' and the start of the answer '\\n\\nred'" in capsys.readouterr().out


def test_messages_are_tokenized_as_a_whole(with_tokenizer):
    tokenizer = prepend()
    collator = with_tokenizer(tokenizer)
    collator.processor.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = row([{"role": "user", "content": "describe"}])
    words = tokenizer.convert_ids_to_tokens(collator.answer_tokens(chat, "red")[0])
    assert words == ["red", "</s>"]  # the prompt ends with a space


def test_limits_cut_the_tokens_after_the_prompt(with_tokenizer):
    tokenizer = prepend()
    (tokens,) = with_tokenizer(tokenizer).answer_tokens(row(max_answer=1), "a red")
    assert tokenizer.convert_ids_to_tokens(tokens) == ["a"]


def test_a_doubled_start_token_is_found(with_tokenizer):
    tokenizer = prepend()
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    meter = LengthMeter(with_tokenizer(tokenizer))
    assert doubled_special_token(meter, row()) is None
    assert doubled_special_token(meter, row("<s>describe")) == "the prompt's tokens have <s> <s> at 0"


def test_answers_of_the_same_tokens_are_found(collator):
    """The words of a WordLevel tokenizer that it does not know are all <unk>."""
    meter = LengthMeter(collator)
    assert same_tokens(meter, row("describe", "a red", "a blue")) is None
    for one, other in (("a red", "a  red"), ("a cat", "a dog")):
        found = same_tokens(meter, row("describe", one, other))
        assert found is not None
        assert found.startswith("chosen and rejected are the same 3 tokens: a ")
