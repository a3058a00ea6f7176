"""Profiled: how many tokens each head of a model needs, found once and remembered for its later caches."""

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..budgets.profile import Profile, ProfileBudget, table_of


class Probed(Protocol):
    """What a layer has to be able to tell."""

    def probed(self) -> list[Tensor]:
        """By row `[H, L]`, what its tokens drew of the attention of those that were read again."""


class Profiled:
    """A cache's side of it.

    Args:
        budget: by which heads get their fractions.
        memory: what is remembered of the model, whichever cache found it.
        group: the processes that hold the heads of each layer among them, or `None` for this one.
    """

    def __init__(self, budget: ProfileBudget, memory: MutableMapping[str, Any], group: Any = None) -> None:
        self.budget, self.group = budget, group
        self._memory, self._own = memory, None

    @property
    def profile(self) -> Profile | None:
        """`None` until it is known."""
        return self._own or self._memory.get(repr(self.budget))

    def learn(self, layers: Sequence[Probed]) -> None:
        """Find it, once all layers have been told of the tokens that were read again."""
        probed = [layer.probed() for layer in layers]
        tables = [table_of(rows) for rows in probed]
        everyone = torch.cat(tables, dim=1)
        if self.group is not None:
            of_processes: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(of_processes, everyone, self.group)
            everyone = torch.cat(of_processes, dim=1)
        self._own = Profile(tables, everyone)
        if min(row.shape[1] for row in probed[0]) >= self.budget.probe_tokens:  # a short prompt speaks for itself only
            self._memory[repr(self.budget)] = self._own.mean

    def forget_rows(self) -> None:
        """After the fold it was found for each row goes; what is remembered of the model stays."""
        self._own = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Profiled":
        return Profiled(self.budget, self._memory, self.group)  # of the same model

    def __reduce__(self) -> tuple[Any, ...]:
        return Profiled, (self.budget, dict(self._memory))  # models and processes do not travel


def middle_start(count: Any, part: int) -> Any:
    """Where `part` tokens in the middle of `count` begin; of a number, or of a tensor of them."""
    return (count - part) * (count > part) // 2


def middle(count: int, part: int | None) -> slice:
    """Of `count` tokens the `part` from their middle; all of them for `None`."""
    first = 0 if part is None else middle_start(count, part)
    return slice(first, count if part is None else min(count, first + part))
