"""TRL's own DPOTrainer with our head, on images. One line differs from plain TRL.

python docs/examples/trl_head.py
"""

import tempfile

from datasets import Dataset
from tiny_llava import color_pairs, tiny_llava
from trl import DPOConfig, DPOTrainer

from cwdpo_kernels.integrations.trl import use_fused_head

folder = tempfile.mkdtemp()
model, processor = tiny_llava()
model.save_pretrained(folder)  # TRL loads policy and reference from here

with use_fused_head():  # SFTTrainer, KTOTrainer, GRPOTrainer and RLOOTrainer get it too
    trainer = DPOTrainer(
        folder,  # or "Qwen/Qwen2.5-VL-3B-Instruct", or a loaded model
        args=DPOConfig(
            f"{folder}/run", loss_type="hinge", max_steps=12, per_device_train_batch_size=8, learning_rate=3e-3,
            logging_steps=1, bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(color_pairs(32)),
        processing_class=processor,
    )  # fmt: skip
trainer.train()

steps = [entry for entry in trainer.state.log_history if "loss" in entry]
for name in ("loss", "rewards/margins", "entropy", "mean_token_accuracy"):
    print(f"{name:20} {steps[0][name]:8.4f} -> {steps[-1][name]:8.4f}")
