"""CW-DPO in TRL, on images. Two things differ from plain TRL: the class, and `cooling=`.

python docs/examples/trl_dpo.py
"""

import tempfile

from datasets import Dataset
from tiny_llava import color_pairs, tiny_llava
from trl import DPOConfig

from cwdpo_kernels import Cooling
from cwdpo_kernels.integrations.trl import CoolingDPOTrainer

folder = tempfile.mkdtemp()
model, processor = tiny_llava()
model.save_pretrained(folder)  # TRL loads policy and reference from here

trainer = CoolingDPOTrainer(
    folder,  # or "Qwen/Qwen2.5-VL-3B-Instruct", or a loaded model
    args=DPOConfig(
        f"{folder}/run", max_steps=12, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=1, beta=0.1,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list(color_pairs(32)),
    processing_class=processor,
    cooling=Cooling(logp_floor=-3.0, temperature=0.5),  # below -3 nats per token a rejected answer hardly pushes
)  # fmt: skip
trainer.train()

steps = [entry for entry in trainer.state.log_history if "cooling_weight" in entry]
for name in ("loss", "rewards/margins", "cooling_weight", "mean_logps/chosen", "mean_logps/rejected"):
    print(f"{name:20} {steps[0][name]:8.4f} -> {steps[-1][name]:8.4f}")
