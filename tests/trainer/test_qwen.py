"""Complete runs of a tiny Qwen2.5-VL, whose number of image tokens depends on the image size, with and without LoRA.

The library's processor needs torchvision, for videos. The one here has only its image processor and tokenizer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cwdpo_trainer.cli import main

sys.path.insert(0, str(Path(__file__).parent))
import tiny_models

WORDS = ["describe", "red", "green", "blue", "a", "the", "square", "and"]
PROMPT = "<|vision_start|> <|image_pad|> <|vision_end|> describe"


class ImageProcessor(hf.ProcessorMixin):
    """The processor of Qwen2.5-VL without videos."""

    return_mm_token_type_ids = True

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        return self.image_token * int(image_inputs["image_grid_thw"][image_idx].prod() // 4)


hf.AutoProcessor.register(hf.Qwen2_5_VLConfig, ImageProcessor, exist_ok=True)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A folder with the model, its processor, and rows with images of different sizes."""
    folder = tmp_path_factory.mktemp("qwen")
    special = ["<pad>", "<s>", "</s>", "<unk>", "<pad4>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>",
               "<|vision_end|>"]  # fmt: skip
    vocab = {word: index for index, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=special[5:],
    )  # fmt: skip
    image_processor = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=1024)
    model, _ = tiny_models.qwen2_5_vl()
    model.save_pretrained(folder / "model")
    ImageProcessor(image_processor, tokenizer).save_pretrained(folder / "model")
    for name, count in (("train", 16), ("heldout", 6)):
        lines = []
        for index in range(count):
            color = ["red", "green", "blue"][index % 3]
            size = [(16, 16), (32, 16), (16, 24)][index // 3 % 3]
            Image.new("RGB", size, color=color).save(folder / f"{name}{index}.png")
            wrong = ["red", "green", "blue"][(index + 1) % 3]
            lines.append({"prompt": PROMPT, "chosen": f"a {color} square", "rejected": f"a {wrong} square and",
                          "images": [f"{name}{index}.png"]})  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run(qwen, settings, write_config, lora):
    settings["model"] = {"path": str(qwen / "model"), "freeze": ["visual"]}
    settings["data"] = {"train": str(qwen / "train.jsonl"), "heldout": str(qwen / "heldout.jsonl")}
    for stage in ("sft", "dpo"):
        settings[stage].update(learning_rate=3e-3, max_steps=8, eval_steps=4)
    if lora:
        targets = ["q_proj", "o_proj", "down_proj"]
        settings["lora"] = {"r": 4, "target_modules": targets, "exclude_modules": ".*visual.*"}
    assert main(["run", str(write_config(settings))]) == 0
    folder = Path(settings["output_dir"])
    metrics = json.loads((folder / "metrics.json").read_text())
    history = json.loads((folder / "sft" / "trainer_state.json").read_text())["log_history"]
    nll = [entry["chosen_nll"] for entry in history if "chosen_nll" in entry]
    assert nll[-1] < nll[0]
    assert metrics["after_cwdpo"]["probes"]["chosen_delta_logp"] != 0
    assert (folder / "cwdpo" / ("adapter_model.safetensors" if lora else "model.safetensors")).is_file()


def test_a_run_with_smaller_images(qwen, settings, write_config, capsys):
    """Rows have 16, 12 or 14 tokens. At max_length 14, the images of the longest get 6 tokens instead of 8."""
    settings["model"] = {"path": str(qwen / "model")}
    settings["data"] = {"train": str(qwen / "train.jsonl"), "heldout": str(qwen / "heldout.jsonl")}
    settings["data"] |= {"max_length": 14, "over_length": "shrink"}
    del settings["dpo"]
    settings["sft"].update(max_steps=2, eval_steps=2)
    assert main(["run", str(write_config(settings))]) == 0
    lines = [line.split(" (")[0] for line in capsys.readouterr().out.splitlines() if "max_length" in line]
    assert [line.split(": ")[1] for line in lines] == [
        "6 of 16 rows have smaller images",
        "3 of 6 rows have smaller images",
    ]


def test_a_check(qwen, settings, write_config, capsys):
    settings["model"] = {"path": str(qwen / "model")}
    settings["data"] = {"train": str(qwen / "train.jsonl"), "heldout": str(qwen / "train.jsonl")}
    assert main(["check", str(write_config(settings)), "data.max_length=14", "data.over_length=shrink"]) == 1
    out = capsys.readouterr().out
    assert "tokens, images: 4 to 8, median 6" in out
    assert "self-test: Qwen2_5_VLForConditionalGeneration: head 40 x 32" in out
    names = [line.split(":")[0] for line in out.splitlines() if line.startswith(("error ", "warning "))]
    # Images have a single color, so rows of the same size and color are duplicates.
    warnings = ["warning duplicate_pairs", "warning longer_than_max_length"]
    assert names == ["error heldout_pairs_in_train", *warnings]
