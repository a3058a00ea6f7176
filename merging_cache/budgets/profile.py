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
    layers fold one by one as they are read, and a row gives what it gives alone. All heads together keep what the ratio
    says, or a slot less in each layer; less where a prompt comes in pieces of fewer than `probe_tokens`, each of which
    speaks for itself until there is a longer one.

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
        counts = stay + rounded(states.head_shares(max(0.0, (num_slots - stay) / free)) * free)  # [B or 1, H]
        order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        kept = rank.flip(-1) < counts.clamp_min(1).to(scores.device).unsqueeze(-1)
        return Survivors.of_mask(kept if states.valid is None else kept & states.valid)


def rounded(numbers: Tensor) -> Tensor:
    """Whole numbers `[..., N]` of the same sum in each row, rounded down, none of which is off by one or more."""
    whole = (numbers.double().cumsum(-1) + 1e-6).floor()
    return whole.diff(prepend=torch.zeros_like(whole[..., :1])).long()


@dataclass(frozen=True)
class Profile:
    """How much of its tokens each head needs, by the quantiles of their scores.

    Args:
        tables: of each layer `[B, H, LEVELS]`, ascending, of the logarithms of its heads' scores in each row; one row
            where it stands for all.
        everyone: `[B, N, LEVELS]`, those of all layers and heads that share slots, these among them.
    """

    tables: Sequence[Tensor]
    everyone: Tensor

    @property
    def mean(self) -> "Profile":
        """That of all rows together."""
        return Profile([one.mean(dim=0, keepdim=True) for one in self.tables], self.everyone.mean(dim=0, keepdim=True))

    def select_rows(self, rows: Tensor) -> "Profile":
        """Of these rows."""
        if len(self.everyone) == 1:
            return self
        return Profile([one[rows.cpu()] for one in self.tables], self.everyone[rows.cpu()])

    def shares(self, layer: int, keep: float) -> Tensor:
        """`[B, H]`, the fraction of its tokens that each head of a layer keeps if all heads keep `keep` on average."""
        least, most = self.everyone.amin(dim=(1, 2)) - 1, self.everyone.amax(dim=(1, 2)) + 1
        for _ in range(STEPS):
            threshold = (least + most) / 2
            is_low = above(self.everyone, threshold).mean(dim=1) > keep
            least, most = torch.where(is_low, threshold, least), torch.where(is_low, most, threshold)
        # where many scores are equal no threshold is right: between the two next ones
        more, less = (above(self.everyone, one).mean(dim=1, keepdim=True) for one in (least, most))
        part = torch.where(more > less, (keep - less) / (more - less).clamp_min(1e-300), torch.zeros_like(more))
        mine = self.tables[layer]
        return above(mine, most) + part * (above(mine, least) - above(mine, most))


@dataclass(frozen=True)
class HeadShares:
    """What a layer is told of a profile.

    Args:
        profile: whose rows are those of the layer's states.
        layer: its number among those that fold.
    """

    profile: Profile
    layer: int

    def select_rows(self, rows: Tensor) -> "HeadShares":
        """For these rows."""
        return HeadShares(self.profile.select_rows(rows), self.layer)

    def __call__(self, keep: float) -> Tensor:
        """`[B or 1, H]`, the fractions of their tokens that heads keep where all of the cache keep `keep`."""
        return self.profile.shares(self.layer, keep)


def table_of(scores: Sequence[Tensor]) -> Tensor:
    """`[B, H, LEVELS]`, quantiles of the logarithms of scores `[H, n]` of each row."""
    levels = torch.linspace(0, 1, LEVELS, dtype=torch.double)
    tables = [
        torch.quantile(one.cpu().double().clamp_min(1e-30).log(), levels, dim=1).mT if one.shape[1] else None
        for one in scores
    ]
    known = torch.stack([one for one in tables if one is not None]).mean(dim=0)
    return torch.stack([known if one is None else one for one in tables])  # rows that are all padding keep nothing


def above(tables: Tensor, threshold: Tensor) -> Tensor:
    """`[B, N]`, the share of scores above the threshold `[B]` of the row, straight between quantiles."""
    asked = threshold.view(-1, 1, 1).expand(*tables.shape[:2], 1).contiguous()
    place = torch.searchsorted(tables.contiguous(), asked)
    left, right = (place - 1).clamp_min(0), place.clamp_max(LEVELS - 1)
    low, high = tables.gather(2, left), tables.gather(2, right)
    within = torch.where(high > low, (asked - low) / (high - low).clamp_min(1e-300), torch.ones_like(low))
    return (1 - (left + within.clamp(0, 1) * (right - left)) / (LEVELS - 1)).squeeze(2)
