"""A progress bar that prints the main metrics only. A probe has about sixty; all of them are in the log."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import ProgressCallback

from cwdpo_trainer.reporter import say

BAR_METRICS = (
    "loss", "margin", "accuracy", "cooling_weight", "chosen_nll", "kept", "onpolicy", "learning_rate",
    "logp_floor", "tau", "eval_chosen_mean_logp", "eval_chosen_delta_logp", "eval_chosen_ece", "eval_chosen_tv",
)  # fmt: skip


class CompactProgress(ProgressCallback):
    """The library's progress bar. Of each log entry it prints the metrics in `BAR_METRICS`."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not (state.is_world_process_zero and self.training_bar is not None):
            return
        metrics = [f"{name.removeprefix('eval_')} {logs[name]:.4g}" for name in BAR_METRICS if logs and name in logs]
        if metrics:
            kind = "probe" if any(name.startswith("eval_") for name in logs) else "train"
            say(f"{kind} {state.global_step:>5}  " + "  ".join(metrics))
