"""`curriculum: hardest_first`: stage 2 sees the pairs whose negatives are hardest for the reference first.

The hardest negative is the one with the highest mean log-prob l under the reference. The cooling weight
w_c = sigmoid((l - logp_floor) / tau) rises with l, so this is also the order by w_c. Sorting by l avoids the ties of
weights that round to 0 or 1, and works with `cooling: off` too.

The order is measured once, before the first step, on the dataset's negatives. Every epoch uses it. A stage of less than
one epoch never sees the easiest pairs, which cooling would have weighted least.
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
    rows: Sequence[Row], measure: Callable[[list[Row]], Tensor], accelerator: Accelerator, batch_size: int, title: str
) -> Tensor:
    """One number per row [R], computed by all processes together; `measure` maps a batch of B rows to a tensor [B].

    With W processes, process k takes rows k, k + W, k + 2W, ... All processes run the same number of batches, because
    the forward of a sharded model is collective. Afterwards every process has all the numbers.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    shown = title if accelerator.is_main_process else None
    values = [measure(list(batch)) for batch in batched(share_of(rows, rank, ranks), batch_size, shown)]
    return in_row_order(accelerator.gather(torch.cat(values)), len(rows), ranks)


def share_of(rows: Sequence[Row], rank: int, ranks: int) -> list[Row]:
    """Every `ranks`-th row from `rank` on. Shares have equal lengths: a short one is padded with the last row."""
    count = -(-len(rows) // ranks)
    return [rows[min(rank + index * ranks, len(rows) - 1)] for index in range(count)]


def in_row_order(gathered: Tensor, count: int, ranks: int) -> Tensor:
    """The inverse of `share_of`: from the values of all shares, concatenated, to one value for each of `count` rows."""
    return gathered.view(ranks, -1).T.flatten()[:count]


def hardest_first(mean_logp: Tensor) -> list[int]:
    """Row indices by descending mean log-prob. Rows with equal values keep their order."""
    return torch.argsort(mean_logp, descending=True, stable=True).tolist()


def save_order(checkpoint: Path, order: list[int]) -> None:
    write_json(checkpoint / ORDER_FILE, order)


def load_order(checkpoint: Path, count: int) -> list[int]:
    """Read what `save_order` wrote. Raises `InputError` unless it orders `count` rows."""
    path = checkpoint / ORDER_FILE
    require(path.is_file(), str(checkpoint), "", f"a checkpoint with {ORDER_FILE}", "one without a curriculum")
    order = read_json(path)
    require(sorted(order) == list(range(count)), str(path), "", f"an order of {count} rows", len(order))
    return order
