"""What the layers of one cache share: how they fold, their batch's padding, and the link to their model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..config import MergingConfig
from ..fold import Fold
from ..model import Link
from ..storage import EvenStorage
from .joint import JointFold
from .learned import Learned
from .padding import Padding


@dataclass(frozen=True)
class Shared:
    """What belongs to a cache and not to one of its layers.

    A layer that is copied alone stays its cache's, so the copy shares this, too: models that loop over their layers
    copy some onto the end of a cache. A cache that is copied whole gets its `twin`, which its layers then join.

    Args:
        config: the options.
        fold: the fold that they describe.
        padding: which tokens of the batch are padding.
        link: the cache's side of the link to its model.
        new_storage: makes the storage of a layer.
        traced: whether to keep where every evicted token went.
        joint: the layers that fold together, where the budget is over layers.
        again: what is to be read again, where a stage wants that.
        learned: what stages have learned of the model, by their names.
    """

    config: MergingConfig
    fold: Fold
    padding: Padding
    link: Link
    new_storage: Callable[[], EvenStorage]
    traced: bool = False
    joint: JointFold | None = None
    again: Any = None  # a `SecondReading`, which knows layers
    learned: Mapping[str, Learned] = field(default_factory=dict)

    @property
    def is_to_be_read_again(self) -> bool:
        """Whether folds have to wait until the prompt, or a part of it, was read again."""
        if self.again is None:
            return False
        if self.fold.again_tokens is None:
            return True
        # without the model to read it, stages go by what is known
        return self.link.decoder is not None and not all(one.is_settled for one in self.learned.values())

    def recalls(self, words: Sequence[tuple[float, ...]]) -> bool:
        """Whether it is known what these tokens tell, by row, so that they need not be read again."""
        return self.fold.rereading.keys() <= self.learned.keys() and all(
            one.recalls(words) for one in self.learned.values()
        )

    def lessons(self, layer_rank: tuple[int, int] | None) -> dict[str, Tensor]:
        """`[B or 1, H, ...]`, what each stage has learned of folding layer `i` of `n`, where anything is known."""
        known = {name: one.lesson for name, one in self.learned.items()}
        return {name: lesson.tables[layer_rank[0]] for name, lesson in known.items() if lesson is not None}

    @property
    def with_model(self) -> Fold | None:
        """The fold of the same options for a cache that is given the model; `None` where that changes nothing."""
        fold = self.config.build(linked=True)
        same = self.link.was_given_model or self.config.compression_ratio == 0 or fold == self.fold
        return None if same else fold

    def row_is_due(self, seen: int) -> bool:
        """Whether a row of so many tokens is to be folded."""
        return self.fold.budget.may_fold(seen, self.config.num_slots(seen))

    def select_rows(self, indices: Tensor, batch: int) -> None:
        """Make row `indices[i]` of the batch row i."""
        self.padding.select_rows(indices, batch)
        for part in self._of_batch:
            part.select_rows(indices)

    def forget(self) -> None:
        """The cache is empty."""
        self.padding.set(None)
        for part in self._of_batch:
            part.forget()

    @property
    def _of_batch(self) -> list[Any]:
        return [*self.learned.values(), *([] if self.again is None else [self.again])]

    def twin(self) -> "Shared":
        """For a copy of the cache: another batch, linked and released by itself."""
        joint = None if self.joint is None else self.joint.twin()
        own = {name: copy.deepcopy(getattr(self, name)) for name in ("padding", "link", "again", "learned")}
        return replace(self, joint=joint, **own)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shared":
        return self
