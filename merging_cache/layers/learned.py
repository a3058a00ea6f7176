"""Learned: what a stage has learned of the model of a cache, found once and remembered for its later caches."""

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..learner import Learner, Lesson
from ..states import LayerStates


class Told(Protocol):
    """What a layer has to be able to tell."""

    def told(self, stage: str) -> list[LayerStates]:
        """By row, its tokens that were read again, with what a stage of this name was told of them."""


class Learned:
    """A cache's side of it: the lesson that one of its stages goes by from the first fold until the cache is emptied.

    Each row of a batch has its own, as if it were alone, unless the model is known when the cache folds first.

    Args:
        name: of the stage, among the cache's.
        stage: which learns.
        layers: the indices of those that fold.
        memory: what is remembered of the model, whichever cache found it.
        group: the processes that hold the heads of each layer among them, or `None` for this one.
    """

    def __init__(
        self, name: str, stage: Learner, layers: Sequence[int], memory: MutableMapping[str, Any], group: Any = None
    ) -> None:
        self.name, self.stage, self.group = name, stage, group
        known = stage.known(layers)
        if known is not None and group is not None:
            known = known.of_process(dist.get_rank(group), dist.get_world_size(group))
        self._memory = memory if known is None else {repr(stage): known}
        self.forget()

    def forget(self) -> None:
        """The cache is empty, or holds another batch; what is remembered of the model stays."""
        self._own: Lesson | None = None
        self._told: Tensor | None = None  # [B or 1], tokens that were told of, while those of a row are few

    @property
    def lesson(self) -> Lesson | None:
        """`None` until something is known."""
        if self._own is None:
            self._own = self._memory.get(repr(self.stage))
        return self._own

    @property
    def is_settled(self) -> bool:
        """Whether all is known, and nothing has to be read again."""
        return self.lesson is not None and self._told is None

    def learn(self, layers: Sequence[Told]) -> None:
        """Once all layers have been told of the tokens that were read again."""
        told = [layer.told(self.name) for layer in layers]
        if self.is_settled:
            return
        new = torch.tensor([row.num_tokens for row in told[0]], dtype=torch.double)
        rows = [self.stage.learn(list(of_row), self._gather) for of_row in zip(*told, strict=True)]
        found = Lesson([torch.stack(tables).cpu() for tables in zip(*rows, strict=True)])
        if self._own is None:
            self._own, self._told = found, new
        else:
            few = (self._told < self.stage.telling_tokens) & (new > 0)
            self._own = self._own.mixed(found, (few * new / (self._told + new)).nan_to_num(nan=0.0))
            self._told = self._told + few * new
        if (self._told >= self.stage.telling_tokens).all():
            self._told = None
            self._memory.setdefault(repr(self.stage), self._own.mean)

    def _gather(self, numbers: Tensor) -> tuple[Tensor, slice]:
        """Numbers about heads `[N, ...]` of all processes, and which of them are these."""
        if self.group is None:
            return numbers, slice(None)
        of_processes: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(of_processes, numbers, self.group)
        first = sum(len(one) for one in of_processes[: dist.get_rank(self.group)])
        return torch.cat(of_processes), slice(first, first + len(numbers))

    def select_rows(self, indices: Tensor) -> None:
        """Make row `indices[i]` of the batch row i."""
        if self._own is not None:
            self._own = self._own.select_rows(indices)
        if self._told is not None and len(self._told) > 1:
            self._told = self._told[indices.cpu()]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Learned":
        twin = object.__new__(Learned)  # of the same model
        vars(twin).update(vars(self))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_memory": dict(self._memory), "group": None}  # models and processes do not travel
