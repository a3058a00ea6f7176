"""Learned: what a stage has learned of the model of a cache, found once and remembered for its later caches."""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..learner import Learner, Lesson
from ..states import LayerStates

LEAST_DIFFERENT = 1 / 4  # of the tokens that a text tells of; about half of those of prose are
MOST_TEXTS = 8  # prompts whose lessons are remembered, in case they come again


class Told(Protocol):
    """What a layer has to be able to tell."""

    def told(self, stage: str) -> list[LayerStates]:
        """By row, its tokens that were read again, with what a stage of this name was told of them."""


@dataclass(frozen=True)
class Taught:
    """What a model has taught a stage so far, whichever caches it came from.

    Args:
        lesson: of one row; `None` as long as no prompt taught anything.
        words: the tokens that it comes from.
        worth: for how many tokens of a text it counts.
        texts: the lessons of the last few prompts, by the tokens that they come from.
    """

    lesson: Lesson | None = None
    words: frozenset[float] = frozenset()
    worth: float = 0.0
    texts: Mapping[tuple[float, ...], Lesson] = field(default_factory=dict)

    def and_by(self, lesson: Lesson, text: tuple[float, ...]) -> "Taught":
        """With what a row of tokens tells.

        New tokens count (see `counted`), and of the others a few. What repeats itself counts for nothing, since of a
        token that comes again and again it says what holds for no text; nor does the very same prompt again, as where a
        model is warmed up or asked whether it lives.
        """
        if different(text) < LEAST_DIFFERENT or text in self.texts:
            return self
        new = max(counted(text, self.words), len(text) / 16)
        worth = self.worth + new
        mixed = lesson if self.lesson is None else self.lesson.mixed(lesson, torch.tensor([new / worth]))
        return replace(self, lesson=mixed, words=self.words | frozenset(text), worth=worth)

    def and_recalling(self, rows: Lesson, texts: Sequence[tuple[float, ...]]) -> "Taught":
        """Remembering what the rows of a batch tell."""
        new = {text: rows.row(number) for number, text in enumerate(texts) if text and text not in self.texts}
        most = max(MOST_TEXTS, len(texts))
        return replace(self, texts=dict([*self.texts.items(), *new.items()][-most:]))


def counted(row: Sequence[float], known: frozenset[float] = frozenset()) -> int:
    """How many tokens of a row count: every new one for two, since in a text about every other token is different."""
    return min(len(row), 2 * len(set(row) - known))


def different(row: Sequence[float]) -> float:
    """Which part of the tokens of a row are; the others repeat them."""
    return len(set(row)) / max(1, len(row))


class Learned:
    """A cache's side of it: the lesson that one of its stages goes by from the first fold until the cache is emptied.

    Each row of a batch has its own, as if it were alone, unless the model is known when the cache folds first. Of a
    batch the row that has most to tell teaches the model. Rows that tell what another cache was told need not be read
    again.

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
    def _taught(self) -> Taught:
        """Nothing, too, where it is of other layers than these: some were taken out since."""
        taught = self._memory.get(repr(self.stage), Taught())
        lessons = [one for one in (taught.lesson, *taught.texts.values()) if one is not None]
        return taught if all(len(one.tables) == self._num_layers for one in lessons) else Taught()

    @property
    def lesson(self) -> Lesson | None:
        """`None` until something is known."""
        if self._own is None and self._taught.worth >= self.stage.teaching_tokens:
            self._own = self._taught.lesson
        return self._own

    @property
    def is_settled(self) -> bool:
        """Whether all is known, and nothing has to be read again."""
        return self.lesson is not None and self._told is None

    def recalls(self, words: Sequence[tuple[float, ...]]) -> bool:
        """Whether it is known what tokens tell, by row."""
        return self._known is not None or all(mine in self._taught.texts for mine in words)

    def learn(self, layers: Sequence[Told], words: Sequence[tuple[float, ...]]) -> None:
        """Once all layers have been told of the tokens that were read again, which of each row are `words`.

        What is recalled they need not have been told. A model that is known goes on to teach as long as other stages
        have it read again.
        """
        told, taught = [layer.told(self.name) for layer in layers], self._taught
        if self._known is not None:
            return
        if all(mine in taught.texts for mine in words):
            found = Lesson.of_rows([taught.texts[mine] for mine in words])
        else:
            rows = [
                self.stage.learn(list(of_row), self._gather, different(mine))
                for of_row, mine in zip(zip(*told, strict=True), words, strict=True)
            ]
            found = Lesson([torch.stack(tables).cpu() for tables in zip(*rows, strict=True)])
        new = torch.tensor([counted(mine) for mine in words], dtype=torch.double)
        if not self.is_settled:
            self._tell(found, new)
        row = int(new.argmax())
        self._memory[repr(self.stage)] = taught.and_by(found.row(row), words[row]).and_recalling(found, words)

    def _tell(self, found: Lesson, new: Tensor) -> None:
        """Go by what each row was told, too, of so many new tokens `[B]`."""
        if self._own is None:
            self._own, self._told = found, new
        else:
            few = (self._told < self.stage.telling_tokens) & (new > 0)
            self._own = self._own.mixed(found, (few * new / (self._told + new)).nan_to_num(nan=0.0))
            self._told = self._told + few * new
        if (self._told >= self.stage.telling_tokens).all():
            self._told = None

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
        # models and processes do not travel
        memory = {repr(self.stage): replace(self._taught, texts={})}
        return vars(self) | {"_memory": memory, "group": None}
