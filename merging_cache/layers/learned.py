"""Learned: what a stage has learned of the model of a cache, found once and remembered for its later caches."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Taught:
    """What a model has taught a stage so far, whichever caches it came from.

    Args:
        lesson: of one row.
        words: the tokens that it comes from.
        texts: these tokens in their order, prompt by prompt, as hashes.
        worth: for how many tokens of a text it counts.
    """

    lesson: Lesson
    words: frozenset[float] = frozenset()
    texts: frozenset[int] = frozenset()
    worth: float = 0.0

    @classmethod
    def by(cls, lesson: Lesson, row: Sequence[float], before: "Taught | None" = None) -> "Taught":
        """By a row of tokens, after what was taught before.

        New tokens count (see `counted`), and of the others a few: a model that reads few different ones (bytes, say) is
        known some day, too. The very same prompt again, as where a model is warmed up or asked whether it lives, counts
        for nothing.
        """
        text, before = hash(tuple(row)), before or cls(lesson)
        if text in before.texts:
            return cls(lesson)
        worth = max(counted(row, before.words), len(row) / 16)
        return cls(lesson, frozenset(row), frozenset([text]), worth)

    def and_then(self, other: "Taught") -> "Taught":
        """With what was taught later."""
        worth = self.worth + other.worth
        share = torch.tensor([other.worth / worth if worth else 0.0], dtype=torch.double)
        lesson = self.lesson.mixed(other.lesson, share)
        return Taught(lesson, self.words | other.words, self.texts | other.texts, worth)


def counted(row: Sequence[float], known: frozenset[float] = frozenset()) -> int:
    """How many tokens of a row count: every new one for two, since in a text about every other token is different."""
    return min(len(row), 2 * len(set(row) - known))


class Learned:
    """A cache's side of it: the lesson that one of its stages goes by from the first fold until the cache is emptied.

    Each row of a batch has its own, as if it were alone, unless the model is known when the cache folds first. Of a
    batch the row that has most to tell teaches the model.

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
        self._num_layers, known = len(layers), stage.known(layers)
        if known is not None and group is not None:
            known = known.of_process(dist.get_rank(group), dist.get_world_size(group))
        self._known, self._memory = known, memory
        self.forget()

    def forget(self) -> None:
        """The cache is empty, or holds another batch; what is remembered of the model stays."""
        self._own = self._known
        self._told: Tensor | None = None  # [B], tokens that were told of, while those of a row are few

    @property
    def _taught(self) -> Taught | None:
        """`None`, too, where it is of other layers than these: some were taken out since."""
        taught = self._memory.get(repr(self.stage))
        return taught if taught is not None and len(taught.lesson.tables) == self._num_layers else None

    @property
    def lesson(self) -> Lesson | None:
        """`None` until something is known."""
        if self._own is None and self._taught is not None and self._taught.worth >= self.stage.telling_tokens:
            self._own = self._taught.lesson
        return self._own

    @property
    def is_settled(self) -> bool:
        """Whether all is known, and nothing has to be read again."""
        return self.lesson is not None and self._told is None

    def learn(self, layers: Sequence[Told], words: Sequence[Sequence[float]]) -> None:
        """Once all layers have been told of the tokens that were read again, which of each row are `words`."""
        told = [layer.told(self.name) for layer in layers]
        if self.is_settled:
            return
        rows = [self.stage.learn(list(of_row), self._gather) for of_row in zip(*told, strict=True)]
        found = Lesson([torch.stack(tables).cpu() for tables in zip(*rows, strict=True)])
        new = torch.tensor([counted(mine) for mine in words], dtype=torch.double)
        if self._own is None:
            self._own, self._told = found, new
        else:
            few = (self._told < self.stage.telling_tokens) & (new > 0)
            self._own = self._own.mixed(found, (few * new / (self._told + new)).nan_to_num(nan=0.0))
            self._told = self._told + few * new
        if (self._told >= self.stage.telling_tokens).all():
            self._told = None
        before = self._taught
        if before is None or before.worth < self.stage.telling_tokens:
            row = int(new.argmax())
            taught = Taught.by(found.row(row), words[row], before)
            self._memory[repr(self.stage)] = taught if before is None else before.and_then(taught)

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
        if self._told is not None:
            self._told = self._told[indices.cpu()]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Learned":
        twin = object.__new__(Learned)  # of the same model
        vars(twin).update(vars(self))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_memory": dict(self._memory), "group": None}  # models and processes do not travel
