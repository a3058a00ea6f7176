"""JointFold: the layers of a cache that fold together, for budgets over layers."""

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from ..budgets import Budget


@dataclass(frozen=True)
class Scored:
    """What a layer hands up.

    Args:
        scores: `[B, H, L]`, infinite for tokens that must stay, `-inf` where there is none.
        positions: `[B, H, L]`.
        num_slots: `[B]`, slots per head that each row may keep on average.
    """

    scores: Tensor
    positions: Tensor
    num_slots: Tensor


class Member(Protocol):
    """What a layer has to be able to do."""

    @property
    def joint(self) -> "JointFold | None":
        """That of its cache."""

    @property
    def fold_is_due(self) -> bool:
        """Whether it waits for its fold."""

    scored: Scored | None  # once it was scored, until it is folded

    def score(self) -> None:
        """Score what it stores."""

    def fold_into(self, kept: Tensor) -> None:
        """Fold into the tokens `[B, H, L]` bool."""


class JointFold:
    """Layers hand up their scores, and get their survivors back: the budget sees all of them at once.

    It keeps no layer alive.

    Args:
        budget: one over layers.
        group: the processes that hold the heads of each layer among them (tensor parallelism), or `None` for this one.
    """

    def __init__(self, budget: Budget, group: Any = None) -> None:
        self.budget, self.group = budget, group
        self._members: list[weakref.ref[Member]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return JointFold, (self.budget,)  # the layers that come with it join anew; processes do not travel

    def twin(self) -> "JointFold":
        """For a copy of the cache, whose layers are to join it."""
        return JointFold(self.budget, self.group)

    def join(self, member: Member) -> None:
        """Have a layer fold with the others."""
        self._members = [weakref.ref(one) for one in (*self.members, member)]

    @property
    def members(self) -> list[Member]:
        """Those that are still there and of the same cache, in the order in which they joined."""
        there = (ref() for ref in self._members)
        return [member for member in there if member is not None and member.joint is self]

    def fold_if_all_are_scored(self) -> None:
        """Fold once the last layer was scored."""
        if all(member.scored is not None for member in self.members):
            self.fold()

    def fold(self) -> None:
        """Fold all layers that wait for it."""
        due = [member for member in self.members if member.fold_is_due]
        for member in due:
            if member.scored is None:
                member.score()
        if due:
            for member, kept in zip(due, self._survivors([member.scored for member in due]), strict=True):
                member.fold_into(kept)

    def _survivors(self, layers: list[Scored]) -> list[Tensor]:
        """Which tokens survive in each layer, `[B, H, L]` bool, of the heads that this process holds."""
        blocks, mine = [(one.scores, one.positions) for one in layers], slice(None)
        if self.group is not None:
            of_processes: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(of_processes, [[part.cpu() for part in block] for block in blocks], self.group)
            blocks = [block for of_layer in zip(*of_processes, strict=True) for block in of_layer]
            mine = slice(dist.get_rank(self.group), None, len(of_processes))
        kept = self.budget.share(*zip(*blocks, strict=True), layers[0].num_slots)
        return [one.to(layer.scores.device) for one, layer in zip(kept[mine], layers, strict=True)]
