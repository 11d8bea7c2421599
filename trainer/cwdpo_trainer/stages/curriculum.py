"""`curriculum: hardest_first`: stage 2 sees the pairs in the order of how hard their negatives are for its reference.

A negative's cooling weight w_c = sigmoid((l - logp_floor) / tau) rises with its mean log-prob l, so the order by w_c is
the order by l, without the ties of weights that are 0 or 1 within rounding, and it is the same with `cooling: off`.
It is measured once, on the data set's negatives, before the first step; every epoch runs in it. A stage that ends
within its first epoch never sees the easiest pairs, whose push would have been cooled away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from cwdpo_trainer.data.rows import Row
from cwdpo_trainer.errors import require
from cwdpo_trainer.files import read_json, write_json
from cwdpo_trainer.negatives.sampling import batched

ORDER_FILE = "curriculum.json"  # in a checkpoint of stage 2


def measure_rows(
    rows: Sequence[Row], of_batch: Callable[[list[Row]], Tensor], accelerator: Accelerator, batch_size: int, title: str
) -> Tensor:
    """`of_batch`, which gives a number for each of some rows, on all `rows` [R], which the processes share.

    Each process takes every W-th row of W processes, and as many batches as the others: those take part in every
    forward of a sharded model. All have all numbers afterwards.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    shown = title if accelerator.is_main_process else None
    values = [of_batch(list(batch)) for batch in batched(share_of(rows, rank, ranks), batch_size, shown)]
    return in_order(accelerator.gather(torch.cat(values)), len(rows), ranks)


def share_of(rows: Sequence[Row], rank: int, ranks: int) -> list[Row]:
    """Every `ranks`-th row from `rank` on; the last row makes up for what a share lacks."""
    count = -(-len(rows) // ranks)
    return [rows[min(rank + place * ranks, len(rows) - 1)] for place in range(count)]


def in_order(gathered: Tensor, count: int, ranks: int) -> Tensor:
    """The numbers of all shares, one share after the other, in the order of the `count` rows."""
    return gathered.view(ranks, -1).T.flatten()[:count]


def hardest_first(mean_logp: Tensor) -> list[int]:
    """Places in the order of falling mean log-prob; equals stay in the order of the data."""
    return torch.argsort(mean_logp, descending=True, stable=True).tolist()


def save_order(checkpoint: Path, order: list[int]) -> None:
    write_json(checkpoint / ORDER_FILE, order)


def load_order(checkpoint: Path, count: int) -> list[int]:
    """The order that `save_order` wrote, of `count` rows."""
    path = checkpoint / ORDER_FILE
    require(path.is_file(), str(checkpoint), "", f"a checkpoint with {ORDER_FILE}", "one without a curriculum")
    order = read_json(path)
    require(sorted(order) == list(range(count)), str(path), "", f"an order of {count} rows", len(order))
    return order
