"""Slots go to the heads that use them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import option
from ..states import LayerStates, Survivors, top_tokens
from .base import Budget


@dataclass
class AdaKVBudget(Budget):
    """The highest scores over all heads of a layer, with a share that every head keeps (AdaKV, arXiv:2407.11550).

    Each head first keeps its own `max(1, floor(safeguard * num_slots))` highest scores; the rest of the layer's
    `H * num_slots` slots goes to the highest scores that are left, whatever their head. It needs a scorer whose scores
    can be compared between heads, as attention weights can. With tensor parallelism heads share the slots of those in
    their own process.

    Args:
        safeguard: the share of its even part that every head keeps, in [0, 1]; 1 is the uniform budget.

    Raises:
        ValueError: if `safeguard` is out of its range.
    """

    ragged = True

    safeguard: float = option(0.2, minimum=0, maximum=1)

    def allocate(self, scores: Tensor, states: LayerStates, num_slots: int) -> Survivors:
        heads, length = scores.shape[1:]
        own = min(length, max(1, int(self.safeguard * num_slots)))
        safe = Survivors(top_tokens(scores, own)).mask(length)
        if states.valid is not None:
            safe &= states.valid
        # of equal scores the later token wins, in whichever head it is
        by_token = scores.masked_fill(safe, torch.inf).mT.flatten(1)
        best = top_tokens(by_token, min(heads * num_slots, heads * length))
        kept = torch.zeros_like(by_token, dtype=torch.bool).scatter_(1, best, True)
        kept = kept.unflatten(1, (length, heads)).mT
        return Survivors.of_mask(kept if states.valid is None else kept & states.valid)
