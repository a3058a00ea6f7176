"""Each head its own fraction of the tokens, as the model itself needs them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import option
from ..states import LayerStates, Statistics, Survivors, drawn_again
from .base import Budget
from .uniform import UniformBudget

LEVELS = 65  # quantiles of a head's scores that are remembered
STEPS = 60  # halvings in search of a threshold


@dataclass
class ProfileBudget(Budget):
    """Every head keeps the fraction of its tokens that the model looks at; the scorer says which.

    How many tokens a head needs is a property of the model, which hardly differs from text to text. It is found once
    for each model: after the first prompt the cache has the model read some of it again, scores all tokens by the
    largest attention that they draw then (as in KVzip, arXiv:2505.23416), and one threshold over all layers and heads
    gives each head its fraction, whatever the ratio. Later caches of the model know it before they read, so their
    layers fold one by one as they are read. All heads together keep what the ratio says, or a slot less in each layer.

    Args:
        probe_tokens: how many tokens, from the middle of the prompt, are read again.
    """

    ragged = True
    reads_again = True

    probe_tokens: int = option(128, minimum=1)

    @property
    def again_tokens(self) -> int:
        return self.probe_tokens

    def observe_again(self, states: LayerStates) -> Statistics:
        return Statistics(tokens=drawn_again(states))

    def allocate(self, scores: Tensor, states: LayerStates, num_slots: int) -> Survivors:
        if states.head_shares is None:
            return UniformBudget().allocate(scores, states, num_slots)
        stay = int((scores == torch.inf).sum(dim=-1).max())
        free = max(1, states.seen - stay)
        counts = stay + rounded(states.head_shares(max(0.0, (num_slots - stay) / free)) * free)
        order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        kept = rank.flip(-1) < counts.clamp_min(1).to(scores.device).view(1, -1, 1)
        return Survivors.of_mask(kept if states.valid is None else kept & states.valid)


def rounded(numbers: Tensor) -> Tensor:
    """Whole numbers of the same sum, rounded down, none of which is off by one or more."""
    whole = (numbers.double().cumsum(0) + 1e-6).floor()
    return whole.diff(prepend=whole.new_zeros(1)).long()


@dataclass(frozen=True)
class Profile:
    """How much of its tokens each head needs, by the quantiles of their scores.

    Args:
        tables: of each layer `[H, LEVELS]`, ascending, of the logarithms of its heads' scores.
        everyone: `[N, LEVELS]`, those of all layers and heads that share slots, these among them.
    """

    tables: Sequence[Tensor]
    everyone: Tensor

    def shares(self, layer: int, keep: float) -> Tensor:
        """`[H]`, the fraction of its tokens that each head of a layer keeps if all heads keep `keep` on average."""
        least, most = self.everyone.min().item() - 1, self.everyone.max().item() + 1
        for _ in range(STEPS):
            threshold = (least + most) / 2
            if above(self.everyone, threshold).mean() > keep:
                least = threshold
            else:
                most = threshold
        # where many scores are equal no threshold is right: between the two next ones
        more, less = above(self.everyone, least).mean(), above(self.everyone, most).mean()
        part = 0.0 if more == less else ((keep - less) / (more - less)).item()
        mine = self.tables[layer]
        return above(mine, most) + part * (above(mine, least) - above(mine, most))


def table_of(scores: Sequence[Tensor]) -> Tensor:
    """`[H, LEVELS]`, quantiles of the logarithms of scores `[H, L]`, the mean over several prompts."""
    levels = torch.linspace(0, 1, LEVELS, dtype=torch.double)
    scores = [one.cpu().double() for one in scores if one.shape[1]]  # rows that are all padding tell nothing
    tables = [torch.quantile(one.clamp_min(1e-30).log(), levels, dim=1).mT for one in scores]
    return torch.stack(tables).mean(dim=0)


def above(tables: Tensor, threshold: float) -> Tensor:
    """`[N]`, the share of each row's scores that is above the threshold, straight between quantiles."""
    place = torch.searchsorted(tables, torch.full((len(tables), 1), threshold, dtype=tables.dtype)).squeeze(1)
    left, right = (place - 1).clamp_min(0), place.clamp_max(LEVELS - 1)
    low, high = (tables.gather(1, one.unsqueeze(1)).squeeze(1) for one in (left, right))
    within = torch.where(high > low, (threshold - low) / (high - low).clamp_min(1e-300), torch.ones_like(low))
    below = (left + within.clamp(0, 1) * (right - left)) / (LEVELS - 1)
    return 1 - below
