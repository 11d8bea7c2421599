"""Runs with LoRA: the reference is the same model with another adapter, and saved adapters can be trained further."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from cwdpo_kernels.integrations.hugging_face import attach_head, check_head
from cwdpo_trainer.cli import main
from cwdpo_trainer.config.arguments import LoraArguments, ModelArguments
from cwdpo_trainer.errors import InputError
from cwdpo_trainer.models.distributed import prepare_reference
from cwdpo_trainer.models.loading import load_model
from cwdpo_trainer.models.reference import AdapterReference, freeze_reference
from cwdpo_trainer.models.reference_cache import fingerprint
from cwdpo_trainer.stages import dpo

TARGETS = ["q_proj", "v_proj", "lm_head"]


@pytest.fixture
def lora_settings(settings):
    settings["lora"] = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}
    return settings


def results(folder: Path) -> dict:
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics.pop("timing")
    return metrics


def base_weights(folder):
    return load_model(ModelArguments(str(folder)), str(folder), None).state_dict()


def test_a_run_trains_only_the_adapters(lora_settings, write_config, task):
    assert main(["run", str(write_config(lora_settings))]) == 0
    folder = Path(lora_settings["output_dir"])
    probes = results(folder)["after_cwdpo"]["probes"]
    assert probes["chosen_delta_logp"] != 0
    for stage in ("sft", "cwdpo"):
        assert (folder / stage / "adapter_model.safetensors").is_file()
        assert not (folder / stage / "model.safetensors").exists()
        assert not (folder / stage / "reference").exists()
    model = load_model(ModelArguments(str(task / "model")), str(folder / "cwdpo"), None, trainable=False)
    ups = [value for name, value in model.state_dict().items() if "lora_B" in name]
    assert len(ups) == 2 * 2 + 2 + 1  # q and v of the vision tower (2 layers) and of the language model (1), the head
    assert all(value.any() for name, value in model.state_dict().items() if "lm_head.lora_B" in name)
    own = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    for name, value in base_weights(task / "model").items():
        assert torch.equal(own[name], value), name


def test_the_reference_of_stage_two_is_the_adapter_of_stage_one(lora_settings, write_config, monkeypatch):
    seen = []
    plain = dpo.CWDPOTrainer.train

    def train(self, *args, **kwargs):
        seen.append((self.reference, copy.deepcopy(self.model.state_dict())))
        output = plain(self, *args, **kwargs)
        seen.append((self.reference, self.model.state_dict()))
        return output

    monkeypatch.setattr(dpo.CWDPOTrainer, "train", train)
    assert main(["run", str(write_config(lora_settings))]) == 0
    (reference, before), (_, after) = seen
    assert isinstance(reference, AdapterReference)
    assert reference.adapter == "reference"
    copies = [name for name in before if ".reference." in name]
    assert copies
    for name in copies:
        assert torch.equal(before[name], before[name.replace(".reference.", ".default.")]), name
        assert torch.equal(before[name], after[name]), name
    trained = [name for name in after if ".default." in name]
    assert any(not torch.equal(before[name], after[name]) for name in trained)


def test_a_run_stopped_between_checkpoints_resumes(lora_settings, write_config, tmp_path, monkeypatch):
    uninterrupted = write_config({**lora_settings, "output_dir": str(tmp_path / "uninterrupted")})
    assert main(["run", str(uninterrupted)]) == 0
    config = write_config(lora_settings)
    plain = dpo.CWDPOTrainer._loss_output

    def stopped(self, model, batch):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return plain(self, model, batch)

    monkeypatch.setattr(dpo.CWDPOTrainer, "_loss_output", stopped)
    assert main(["run", str(config)]) == 130
    monkeypatch.setattr(dpo.CWDPOTrainer, "_loss_output", plain)
    assert main(["run", str(config)]) == 0
    folder = Path(lora_settings["output_dir"])
    assert results(folder) == results(tmp_path / "uninterrupted")
    for name in ("probes.csv", "predictions.jsonl", "cwdpo/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes(), name
    assert len(list((folder / "reference_cache").iterdir())) == 1  # the adapter from disk is the one that was there


@pytest.fixture
def adapted(task):
    settings = ModelArguments(str(task / "model"))
    return load_model(settings, settings.path, LoraArguments(target_modules=TARGETS, lora_dropout=0.5))


def logits(model, collator, rows):
    return model(**collator.prompts(rows[:2])).logits.detach()


def test_references_have_distinct_fingerprints(adapted, collator):
    """A fingerprint covers the base model and the reference's adapter, but not the adapter in training."""

    def name(reference):
        return fingerprint(reference, collator.processor, "weights")

    def train():
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.normal_()

    base = freeze_reference(adapted)
    names = [name(base)]
    train()
    assert name(base) == names[0]
    trained = freeze_reference(adapted)
    names.append(name(trained))
    train()
    assert name(trained) == names[1]
    names.append(name(freeze_reference(adapted)))
    adapted.peft_config["reference"].lora_alpha *= 2
    names.append(name(freeze_reference(adapted)))
    assert len(set(names)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reference_has_the_precision_of_training_from_the_start(adapted, collator, rows, dtype):
    """Cooling and curriculum call it before the library prepares the policy, and the cache stores its log-probs."""
    attach_head(adapted)
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process, else
    accelerator = Accelerator(mixed_precision="no" if dtype == torch.float32 else "bf16", cpu=True)
    reference = prepare_reference(accelerator, freeze_reference(adapted))
    seen = reference(**collator.prompts(rows[:2]), head_op=lambda hidden, head: hidden.dtype)
    assert seen == dtype
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_new_adapter_needs_no_copy(adapted, collator, rows):
    reference = freeze_reference(adapted)
    assert reference.adapter is None
    before = logits(reference, collator, rows)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert torch.equal(logits(reference, collator, rows), before)
    assert (logits(adapted.eval(), collator, rows) - before).abs().max() > 0.1
    assert freeze_reference(adapted).adapter == "reference"


def test_a_call_of_the_reference_leaves_the_policy_unchanged(adapted, collator, rows):
    reference = freeze_reference(adapted.train())
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    reference(**collator.prompts(rows[:2]))
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == trainable
    assert trainable
    assert all(module.training for module in adapted.modules() if isinstance(module, torch.nn.Dropout))
    assert adapted.active_adapters == ["default"]
    assert list(reference.parameters()) == []


def test_a_pretrained_adapter_is_both_start_and_reference(adapted, collator, rows, task, tmp_path):
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    settings = ModelArguments(str(task / "model"))
    policy = load_model(settings, settings.path, LoraArguments(adapter=str(tmp_path / "adapter")))
    expected = logits(adapted.eval(), collator, rows)
    reference = freeze_reference(policy)
    assert reference.adapter == "reference"
    torch.testing.assert_close(logits(reference, collator, rows), expected, rtol=0, atol=0)
    policy.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "reference").exists()


def test_a_frozen_tower_is_not_trained(task):
    settings = ModelArguments(str(task / "model"), freeze=["vision_tower"])
    model = load_model(settings, settings.path, None)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "vision_tower" in name}
    with pytest.raises(InputError, match=r"model.freeze: expected names of modules, such as .*got 'tower'"):
        load_model(ModelArguments(settings.path, freeze=["tower"]), settings.path, None)


def test_unknown_target_modules_are_named(task):
    settings = ModelArguments(str(task / "model"))
    with pytest.raises(InputError, match=r"lora.target_modules: expected names of the model's modules, got no_such"):
        load_model(settings, settings.path, LoraArguments(target_modules=["no_such_layer"]))


def test_gradient_checkpointing_changes_nothing(lora_settings, write_config, tmp_path):
    lora_settings["dpo"]["onpolicy_fraction"] = 0.0
    assert main(["run", str(write_config(lora_settings))]) == 0
    plain = results(Path(lora_settings["output_dir"]))
    lora_settings["output_dir"] = str(tmp_path / "checkpointed")
    for stage in ("sft", "dpo"):
        lora_settings[stage]["activation_checkpointing"] = True
    assert main(["run", str(write_config(lora_settings))]) == 0
    checkpointed = results(tmp_path / "checkpointed")
    for key, value in plain["after_cwdpo"]["probes"].items():
        assert checkpointed["after_cwdpo"]["probes"][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


@pytest.fixture
def wide(task, tmp_path) -> Path:
    """A LLaVA with layers large enough to be quantized, and the processor of the tiny model."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = hf.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=64)
    text = hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=17, max_position_embeddings=64, pad_token_id=0)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
    hf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "wide")
    hf.LlavaProcessor.from_pretrained(task / "model").save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_fused_logp_of_quantized_weights_equals_the_models_own(wide, collator, rows):
    settings = ModelArguments(str(wide), quantization="4bit", dtype="bfloat16")
    policy = load_model(settings, settings.path, LoraArguments(r=4))
    assert {type(module).__name__ for module in policy.modules()} >= {"Linear4bit", "PeftModelForCausalLM"}
    assert {name.rpartition(".")[2] for name, value in policy.named_parameters() if value.requires_grad} == {"weight"}
    assert all("lora_" in name for name, value in policy.named_parameters() if value.requires_grad)
    policy.save_pretrained(wide / "adapter")
    again = load_model(settings, str(wide / "adapter"), None)
    dtypes = [{name: value.dtype for name, value in model.named_parameters()} for model in (policy, again)]
    assert dtypes[0] == dtypes[1]
    attach_head(policy)
    inputs = collator(rows[:2])
    assert check_head(policy, *collator.join(inputs["prompts"], inputs["chosen"], inputs["rejected"])) < 1e-2


def test_quantized_weights_are_frozen(wide):
    settings = ModelArguments(str(wide), quantization="4bit", dtype="float32")
    with pytest.raises(InputError, match=r"model.quantization: expected null without a section lora, got 4bit"):
        load_model(settings, settings.path, None)


def test_training_quantized_weights_on_a_cpu_is_refused(wide, settings, write_config, capsys):
    settings["model"] = {"path": str(wide), "quantization": "4bit", "dtype": "float32"}
    for stage in ("sft", "dpo"):
        settings[stage]["use_cpu"] = True
    assert main(["run", str(write_config({**settings, "lora": {"r": 4}}))]) == 2
    assert "model.quantization: expected null on a CPU, got bitsandbytes" in capsys.readouterr().err


def test_peft_is_what_trains(adapted):
    assert isinstance(adapted, peft.PeftModel)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_" in name}
    assert names == set(TARGETS)
