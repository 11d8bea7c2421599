"""One process of a distributed run on CPUs: `python run_worker.py {ddp,fsdp} CONFIG [STOP]`, ranks in the environment.

With STOP, both processes exit abruptly before step STOP of stage 2. accelerate shards on accelerators only, so this
worker replaces its device check; how it shards is unchanged.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from cwdpo_trainer import cli
from cwdpo_trainer.evaluation import report
from cwdpo_trainer.stages import dpo

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip


def end_at(step: int) -> None:
    plain = dpo.CWDPOTrainer._loss_output

    def loss(self: dpo.CWDPOTrainer, *args: object) -> object:
        if self.state.global_step == step:
            os._exit(0)
        return plain(self, *args)

    dpo.CWDPOTrainer._loss_output = loss


def main(kind: str, config: str, stop: str | None = None) -> int:
    torch.set_num_threads(1)
    report.draw_dynamics = lambda path, histories: path.touch()  # other tests look at the plot
    if stop is not None:
        end_at(int(stop))
    if kind == "fsdp":
        os.environ.update(FSDP2)
        plain = PartialState.__init__

        def as_if_on_accelerators(self: PartialState, *args: object, **kwargs: object) -> None:
            first = not PartialState._shared_state
            plain(self, *args, **kwargs)
            if first:
                self.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = as_if_on_accelerators
    status = cli.main(["run", config])
    assert (AcceleratorState().distributed_type == DistributedType.FSDP) is (kind == "fsdp")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
