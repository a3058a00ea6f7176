"""One threshold over the scores of all layers and heads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..states import LayerStates, Survivors
from .base import Budget


@dataclass
class GlobalBudget(Budget):
    """The highest scores over all layers and heads of a cache, however they are spread (as in KVzip, arXiv:2505.23416).

    Together they keep `num_slots * heads * layers` slots, no more and no less; of equal scores the later token stays.
    Sinks, recent tokens and the best token of every head are among them. Each row of a batch has its own threshold. It
    needs a scorer whose scores can be compared between layers, as attention weights can.

    All layers fold together, once the last of them has been scored: until then the cache holds the whole prompt, which
    is its peak. Scores travel between devices, keys and values do not.
    """

    ragged = True
    over_layers = True

    def allocate(self, scores: Tensor, states: LayerStates, num_slots: int) -> Survivors:
        """As if this were the only layer."""
        slots = torch.full((len(scores),), num_slots, device=scores.device)
        (kept,) = self.share([scores], [states.positions], slots)
        return Survivors.of_mask(kept)

    def share(self, scores: Sequence[Tensor], positions: Sequence[Tensor], num_slots: Tensor) -> list[Tensor]:
        """Which tokens survive in each layer, `[B, H, L]` bool.

        Args:
            scores: of each layer, `[B, H, L]`, higher is kept; infinite for tokens that must be, and `-inf` where there
                is no token, which must not be.
            positions: of each layer, `[B, H, L]`, by which ties break.
            num_slots: `[B]`, slots per head that each row may keep on average.
        """
        device = scores[0].device
        heads = sum(one.shape[1] for one in scores)
        ranked = [_with_best(one).flatten(1).to(device) for one in scores]
        shapes, widths = [one.shape for one in scores], [one.shape[1] for one in ranked]
        where = torch.cat([one.flatten(1).to(device) for one in positions], dim=1)
        flat = torch.cat(ranked, dim=1)
        rows = zip(flat, where, num_slots.tolist(), strict=True)
        kept = torch.stack([_highest(*row, count * heads) for *row, count in rows])
        return [
            part.view(shape).to(one.device)
            for part, shape, one in zip(kept.split(widths, dim=1), shapes, scores, strict=True)
        ]


def _with_best(scores: Tensor) -> Tensor:
    """With the best token of every head, of equal ones the last, among those that must be kept."""
    index = torch.arange(scores.shape[-1], device=scores.device)
    is_best = (scores == scores.amax(dim=-1, keepdim=True)) & (scores > -torch.inf)
    last = index.masked_fill(~is_best, -1).amax(dim=-1, keepdim=True)
    return scores.masked_fill(is_best & (index == last), torch.inf)


def _highest(scores: Tensor, positions: Tensor, count: int) -> Tensor:
    """`[N]` bool, the `count` highest of scores `[N]` above `-inf`; of equal ones those at later positions."""
    exists = scores > -torch.inf
    if count >= int(exists.sum()):
        return exists
    least = scores.kthvalue(len(scores) - count + 1).values  # the count-th highest
    kept = scores > least
    tied = (scores == least).nonzero().squeeze(1)
    last = positions[tied].sort(stable=True).indices[len(tied) - (count - int(kept.sum())) :]
    kept[tied[last]] = True
    return kept
