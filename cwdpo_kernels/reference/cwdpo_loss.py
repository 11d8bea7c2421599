"""cwdpo_loss with a loop over the pairs, as in the paper."""

import torch
from torch import Tensor

from ..types import Cooling, SequenceLogprob


def cwdpo_loss(
    chosen: SequenceLogprob, rejected: SequenceLogprob, ref_chosen: Tensor, ref_rejected: Tensor, beta: float,
    cooling: Cooling, normalize: str = "sequence",
) -> Tensor:  # fmt: skip
    """The scalar loss; 0 if no pair is kept."""
    losses = []
    for pair in range(chosen.total.shape[0]):
        n_chosen, n_rejected = chosen.count[pair].item(), rejected.count[pair].item()
        mean_rejected = rejected.mean[pair].detach()
        if n_chosen == 0 or n_rejected == 0:
            continue
        if cooling.drop_below is not None and mean_rejected < cooling.drop_below:
            continue
        d_chosen = chosen.total[pair] - ref_chosen[pair]
        d_rejected = rejected.total[pair] - ref_rejected[pair]
        if normalize == "token":
            d_chosen, d_rejected = d_chosen / n_chosen, d_rejected / n_rejected
        weight: Tensor | float
        if cooling.constant is None:
            weight = torch.sigmoid((mean_rejected - cooling.logp_floor) / cooling.temperature)
        else:
            weight = cooling.constant
        # A weight of 0 leaves out an impossible negative (0 * -inf), but not NaN.
        absent = weight == 0 and bool(torch.isinf(d_rejected))
        cooled = 0.0 if absent else weight * d_rejected
        losses.append(-torch.nn.functional.logsigmoid(beta * (d_chosen - cooled)))
    return torch.stack(losses).mean() if losses else chosen.total.sum() * 0.0
