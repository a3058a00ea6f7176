"""Stages that learn of a model what they go by, from parts of its first prompts that it reads again."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .stage import Stage
from .states import LayerStates, Statistics, changes_left_out, rows_of

LEAD = 64  # tokens that are read again to get into the text, and tell nothing themselves
Gather = Callable[[Tensor], tuple[Tensor, slice]]


@dataclass(frozen=True)
class Lesson:
    """What a stage has learned of a model.

    Args:
        tables: by layer `[B, H, ...]`, numbers about each KV head; of each row of the batch, or one row that stands for
            all.
    """

    tables: Sequence[Tensor]

    @classmethod
    def of_rows(cls, rows: Sequence["Lesson"]) -> "Lesson":
        """Of a batch of such rows."""
        return cls([torch.cat(tables) for tables in zip(*(row.tables for row in rows), strict=True)])

    def row(self, index: int) -> "Lesson":
        """Of one row."""
        return Lesson([one[index : index + 1] for one in self.tables])

    def mixed(self, other: "Lesson", weight: Tensor) -> "Lesson":
        """With that much of another one in each row, `[B]` from 0 to 1; what is NaN says nothing."""

        def lerp(mine: Tensor, theirs: Tensor) -> Tensor:
            both = torch.lerp(mine, theirs, weight.to(mine.dtype).view(-1, *[1] * (mine.dim() - 1)))
            return torch.where(mine.isnan(), theirs, torch.where(theirs.isnan(), mine, both))

        return Lesson([lerp(*both) for both in zip(self.tables, other.tables, strict=True)])

    def select_rows(self, rows: Tensor) -> "Lesson":
        """Of these rows."""
        return Lesson([rows_of(one, rows) for one in self.tables])

    def of_process(self, rank: int, count: int) -> "Lesson":
        """Of the heads of one of `count` processes that share the heads of each layer."""
        return Lesson([one.chunk(count, dim=1)[rank] for one in self.tables])


class Learner(Stage):
    """A stage that learns of a model what it goes by.

    After a prompt the cache has the model read `probe_tokens` from its middle again, from where it stands behind the
    prompt. The first of them, `LEAD` or half, get it into the text; of each of the others the stage is told how much
    the layers' outputs would change without it (as by `leave_one_out`). The cache goes by what it makes of that; of a
    short prompt together with what comes after it. What prompts tell is averaged for the model, and once it comes from
    `teaching_tokens`, which takes two or three different prompts, later caches know it before they read, and nothing is
    read again. About every other token has to be new for that; a prompt that repeats itself, of whose tokens less than
    a quarter are different, speaks for itself only.
    """

    learns = True
    probe_tokens: int

    @property
    def reads_again(self) -> bool:
        return True

    @property
    def needs_outputs(self) -> bool:
        return self.reads_again

    @property
    def again_tokens(self) -> int:
        return self.probe_tokens

    @property
    def telling_tokens(self) -> int:
        """How many tokens have to be told of before the rest of a cache's life goes by them."""
        return self.probe_tokens - lead_of(self.probe_tokens)

    @property
    def teaching_tokens(self) -> int:
        """How many before the rest of the model's life does: of more than one text, lest it goes by one kind only."""
        return 2 * self.telling_tokens

    def observe_again(self, states: LayerStates) -> Statistics:
        return Statistics(tokens=changes_left_out(states))

    def known(self, layers: Sequence[int]) -> Lesson | None:
        """What it brings along of these layers; `None` where it has to learn."""
        return None

    @abstractmethod
    def learn(self, layers: Sequence[LayerStates], gather: Gather, different: float = 1.0) -> list[Tensor]:
        """What it makes of what one row of a batch was told.

        Args:
            layers: of each layer, the tokens that were told of, `[1, H, n, D]`; how much the output changes without
                each stands in `statistics.tokens`, `[1, H, n]`.
            gather: gives numbers about heads `[N, ...]` of all processes that share the layers' heads, and which of
                them are those that it was given.
            different: which part of the tokens are, where the others repeat them.

        Returns:
            by layer `[H, ...]`, which `states.lesson` then brings back; NaN where this row tells it nothing.
        """


def lead_of(count: int) -> int:
    """How many of so many tokens that are read again tell nothing."""
    return min(count // 2, LEAD)
