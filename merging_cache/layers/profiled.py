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
        """By row `[H, n]`, what its tokens that were read again drew of their own attention then."""


class Profiled:
    """A cache's side of it: the profile that it goes by from its first fold until it is emptied.

    Each row of a batch has its own, as if it were alone, unless the model is known when the cache folds first.

    Args:
        budget: by which heads get their fractions.
        memory: what is remembered of the model, whichever cache found it.
        group: the processes that hold the heads of each layer among them, or `None` for this one.
    """

    @classmethod
    def of(
        cls, budget: ProfileBudget, layers: Sequence[int], memory: MutableMapping[str, Any], group: Any
    ) -> "Profiled":
        """Of these layers, for a model whose memory this is, unless the budget brings its own."""
        if not budget.weights:
            return cls(budget, memory, group)
        profile = budget.calibrated(layers)
        if group is not None:
            profile = profile.of_process(dist.get_rank(group), dist.get_world_size(group))
        return cls(budget, {repr(budget): profile}, group)

    def __init__(self, budget: ProfileBudget, memory: MutableMapping[str, Any], group: Any = None) -> None:
        self.budget, self.group = budget, group
        self._memory = memory
        self.forget()

    def forget(self) -> None:
        """The cache is empty, or holds another batch; what is remembered of the model stays."""
        self._own: Profile | None = None
        self._read: Tensor | None = None  # [B or 1], tokens that have told something, while those of a row are few

    @property
    def profile(self) -> Profile | None:
        """`None` until something is known."""
        if self._own is None:
            self._own = self._memory.get(repr(self.budget))
        return self._own

    @property
    def is_settled(self) -> bool:
        """Whether all is known, and nothing has to be read again."""
        return self.profile is not None and self._read is None

    def learn(self, layers: Sequence[Probed]) -> None:
        """Once all layers have been told of the tokens that were read again."""
        probed = [layer.probed() for layer in layers]
        if self.is_settled:
            return
        new = torch.tensor([row.shape[1] for row in probed[0]], dtype=torch.double)
        rows = [self._tables([of_layer[row] for of_layer in probed]) for row in range(len(new))]
        found = Profile([torch.stack(tables) for tables in zip(*rows, strict=True)])
        if self._own is None:
            self._own, self._read = found, new
        else:
            few = (self._read < self.budget.telling_tokens) & (new > 0)
            self._own = self._own.mixed(found, (few * new / (self._read + new)).nan_to_num(nan=0.0))
            self._read = self._read + few * new
        if (self._read >= self.budget.telling_tokens).all():
            self._read = None
            self._memory.setdefault(repr(self.budget), self._own.mean)

    def _tables(self, of_layers: list[Tensor]) -> list[Tensor]:
        """By layer `[H, STEPS + 1]`, of the scores `[H, n]` of a row."""
        heads, scores, mine = [len(one) for one in of_layers], torch.cat([one.cpu() for one in of_layers]), slice(None)
        if self.group is not None:
            of_processes: list[Any] = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(of_processes, scores, self.group)
            first = sum(len(one) for one in of_processes[: dist.get_rank(self.group)])
            scores, mine = torch.cat(of_processes), slice(first, first + len(scores))
        return list(table_of(scores)[mine].split(heads))

    def select_rows(self, indices: Tensor) -> None:
        """Make row `indices[i]` of the batch row i."""
        if self._own is not None:
            self._own = self._own.select_rows(indices)
        if self._read is not None and len(self._read) > 1:
            self._read = self._read[indices.cpu()]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Profiled":
        twin = object.__new__(Profiled)  # of the same model
        vars(twin).update(vars(self))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_memory": dict(self._memory), "group": None}  # models and processes do not travel
