"""What the results of a sweep say: scores, what is lost against the full cache, what merging gains, and the costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import TEXT, Variant
from .metrics import bootstrap_interval_of_tasks
from .results import Results


@dataclass(frozen=True)
class Difference:
    """A mean difference and its 95% bootstrap interval, taken example by example."""

    mean: float
    low: float
    high: float
    examples: int

    @classmethod
    def between(cls, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> "Difference":
        """Of the examples of several tasks, every task counting alike."""
        differences = [mine - other for mine, other in zip(ours, theirs, strict=True)]
        low, high = bootstrap_interval_of_tasks(differences)
        return cls(mean_of_tasks(differences), low.item(), high.item(), sum(map(len, differences)))

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves out 0; of one example there is none."""
        return self.examples > 1 and (self.low > 0 or self.high < 0)

    def text(self, digits: int) -> str:
        """`"+0.012 [-0.001, +0.025]"`."""
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


@dataclass(frozen=True)
class Row:
    """One cache on some tasks of one context length.

    Args:
        tasks: which tasks; means are taken over them, each counting alike.
        context_length: tokens.
        variant: how the cache was held.
        examples: how many examples in all.
        values: means of what was measured: `"score"` (or `"loss"` and `"kl"`), `"bytes"`, `"prefill_seconds"`,
            `"decoding_seconds"`, `"merged"` and `"dropped"`; seconds are those of a batch, shared by its examples.
        share: bytes as a share of the full cache's.
        lost: the difference to the full cache (of the score, or of the loss).
        gained: the difference to the same cache with `merger="drop"`; `None` for that and for the full cache.
    """

    tasks: tuple[str, ...]
    context_length: int
    variant: Variant
    examples: int
    values: dict[str, float]
    share: float
    lost: Difference | None
    gained: Difference | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "tasks": list(self.tasks),
            "context_length": self.context_length,
            "cache": self.variant.label,
            "variant": self.variant.to_dict(),
            "examples": self.examples,
            **self.values,
            "share_of_bytes": self.share,
            "against_full_cache": None if self.lost is None else vars(self.lost),
            "gain_over_drop": None if self.gained is None else vars(self.gained),
        }


def mean_of_tasks(values: Sequence[Tensor]) -> float:
    """The mean over tasks of the means over their examples."""
    return torch.stack([one.mean() for one in values]).mean().item()


class Summary:
    """What was measured, row by row.

    Args:
        results: what was measured.
        cells: which cells to sum up; those that were not measured yet are left out.
    """

    def __init__(self, results: Results, cells: Sequence[dict[str, Any]]) -> None:
        self.setting = results.setting
        self._measured: dict[tuple[str, int, str], dict[str, list]] = {}
        self.variants: dict[str, Variant] = {}
        self.tasks: dict[int, list[str]] = {}
        self._rows: dict[tuple[tuple[str, ...], int, str], Row | None] = {}
        for cell in cells:
            if cell in results:
                variant = Variant(**cell["variant"])
                task, length = cell["task"], cell["context_length"]
                self.variants[variant.key] = variant
                self._measured[task, length, variant.key] = results[cell]
                if task not in self.tasks.setdefault(length, []):
                    self.tasks[length].append(task)

    def questions(self, length: int) -> list[str]:
        """The tasks that ask something."""
        return [task for task in self.tasks.get(length, ()) if task != TEXT]

    def measured(self, task: str, length: int, variant: Variant) -> dict[str, list] | None:
        """What was measured of every example of a cell."""
        return self._measured.get((task, length, variant.key))

    def row(self, tasks: Sequence[str], length: int, variant: Variant) -> Row | None:
        """A cache on some tasks; `None` where not all of them were measured."""
        key = (tuple(tasks), length, variant.key)
        if key not in self._rows:  # tables, pictures and the page ask for the same ones
            self._rows[key] = self._make_row(tasks, length, variant)
        return self._rows[key]

    def _make_row(self, tasks: Sequence[str], length: int, variant: Variant) -> Row | None:
        def of(one: Variant, metric: str) -> list[Tensor] | None:
            measured = [self.measured(task, length, one) for task in tasks]
            if not measured or None in measured:
                return None
            return [torch.tensor(columns[metric], dtype=torch.float64) for columns in measured]

        metric = "loss" if TEXT in tasks else "score"
        mine = of(variant, metric)
        if mine is None:
            return None
        names = [name for name in self.measured(tasks[0], length, variant) if name != "prediction"]
        values = {name: mean_of_tasks(of(variant, name)) for name in names}
        full, full_bytes = of(Variant(), metric), of(Variant(), "bytes")
        dropped = of(variant.dropping, metric)
        compared = not variant.is_full
        return Row(
            tuple(tasks),
            length,
            variant,
            sum(map(len, mine)),
            values,
            share=1.0 if full_bytes is None else values["bytes"] / mean_of_tasks(full_bytes),
            lost=Difference.between(mine, full) if compared and full is not None else None,
            gained=Difference.between(mine, dropped) if variant.merges and dropped else None,
        )

    def rows(self, tasks: Sequence[str], length: int) -> list[Row]:
        """Every cache on these tasks, in the order of the sweep."""
        found = (self.row(tasks, length, variant) for variant in self.variants.values())
        return [row for row in found if row is not None]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it: the setting, then a row for each cell and for each cache over all tasks."""
        of_tasks, of_all = [], []
        for length, tasks in self.tasks.items():
            of_tasks += [row.to_dict() for task in tasks for row in self.rows([task], length)]
            if len(self.questions(length)) > 1:
                of_all += [row.to_dict() for row in self.rows(self.questions(length), length)]
        return {"setting": self.setting, "over_all_tasks": of_all, "by_task": of_tasks}
