"""JointFold: the layers of a cache that fold together, for budgets over layers."""

import weakref
from dataclasses import dataclass
from typing import Any, Protocol

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
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._members: list[weakref.ref[Member]] = []

    def join(self, member: Member) -> None:
        """Have a layer fold with the others."""
        self._members.append(weakref.ref(member))

    def __getstate__(self) -> dict[str, Any]:
        return {"budget": self.budget, "members": self.members}  # weak references are not pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["budget"])
        for member in state["members"]:
            self.join(member)

    @property
    def members(self) -> list[Member]:
        """Those that are still there, in the order in which they joined."""
        return [member for ref in self._members if (member := ref()) is not None]

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
        if not due:
            return
        scored = [member.scored for member in due]
        scores, positions = [one.scores for one in scored], [one.positions for one in scored]
        for member, kept in zip(due, self.budget.share(scores, positions, scored[0].num_slots), strict=True):
            member.fold_into(kept)
