"""What the results of a sweep say: scores and losses, against the full cache and against dropping, and the costs."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import Variant
from .metrics import bootstrap_interval_of_tasks
from .results import Results

COMPARED = ("score", "loss")


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
        values: means of what was measured (see `Questioned.measure`), of some of it over fewer tasks: only those that
            generate have `"decoding_seconds"`. Seconds are those of a batch, shared by its contexts.
        share: bytes as a share of the full cache's.
        against_full: by `"score"` and `"loss"`, the difference to the full cache; empty for that itself.
        against_drop: the same to the same cache with `merger="drop"`; empty for that and for the full cache.
    """

    tasks: tuple[str, ...]
    context_length: int
    variant: Variant
    examples: int
    values: dict[str, float]
    share: float
    against_full: dict[str, Difference]
    against_drop: dict[str, Difference]

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
            "against_full_cache": {name: vars(one) for name, one in self.against_full.items()},
            "against_drop": {name: vars(one) for name, one in self.against_drop.items()},
        }


def mean_of_tasks(values: Sequence[Tensor]) -> float:
    """The mean over tasks of the means over their examples."""
    return torch.stack([one.mean() for one in values]).mean().item()


def average(columns: Iterable[Sequence[float]]) -> float:
    """The same of lists."""
    return mean_of_tasks([torch.tensor(column).double() for column in columns])


class Summary:
    """What was measured, row by row.

    Args:
        results: what was measured.
        cells: which cells to sum up. Those of which nothing was measured are left out; of a task the examples that were
            measured with all caches are compared.
    """

    def __init__(self, results: Results, cells: Sequence[dict[str, Any]]) -> None:
        self.setting = results.setting
        self.variants: dict[str, Variant] = {}
        self.tasks: dict[int, list[str]] = {}
        self.indices: dict[tuple[str, int], list[int]] = {}
        self._measured: dict[tuple[str, int, str], dict[int, dict[str, Any]]] = {}
        self._rows: dict[tuple[tuple[str, ...], int, str], Row | None] = {}
        of_tasks: dict[tuple[str, int], list[set[int]]] = defaultdict(list)
        for cell in cells:
            if measured := results[cell]:
                variant = Variant(**cell["variant"])
                task, length = cell["task"], cell["context_length"]
                self.variants[variant.key] = variant
                self._measured[task, length, variant.key] = measured
                of_tasks[task, length].append(set(measured))
                if task not in self.tasks.setdefault(length, []):
                    self.tasks[length].append(task)
        for key, measured in of_tasks.items():
            self.indices[key] = sorted(set.intersection(*measured) or max(measured, key=len))

    def measured(self, task: str, length: int, variant: Variant) -> dict[str, list] | None:
        """What was measured of the examples of a cell that are compared; `None` where one is missing."""
        found = self._measured.get((task, length, variant.key), {})
        rows = [found.get(index) for index in self.indices.get((task, length), [None])]
        if None in rows:
            return None
        return {name: [row[name] for row in rows] for name in rows[0]}

    def row(self, tasks: Sequence[str], length: int, variant: Variant) -> Row | None:
        """A cache on some tasks; `None` where not all of them were measured."""
        key = (tuple(tasks), length, variant.key)
        if key not in self._rows:  # tables, pictures and the page ask for the same ones
            self._rows[key] = self._make_row(tasks, length, variant)
        return self._rows[key]

    def _make_row(self, tasks: Sequence[str], length: int, variant: Variant) -> Row | None:
        def of(one: Variant) -> list[dict[str, list]] | None:
            measured = [self.measured(task, length, one) for task in tasks]
            return None if not measured or None in measured else measured

        def against(other: list[dict[str, list]] | None) -> dict[str, Difference]:
            if other is None:
                return {}

            def columns(measured: list[dict[str, list]], name: str) -> list[Tensor]:
                return [torch.tensor(one[name]).double() for one in measured]

            return {name: Difference.between(columns(mine, name), columns(other, name)) for name in COMPARED}

        mine, full = of(variant), of(Variant())
        if mine is None:
            return None
        names = list(dict.fromkeys(name for one in mine for name in one if name != "prediction"))
        values = {name: average(one[name] for one in mine if name in one) for name in names}
        return Row(
            tuple(tasks),
            length,
            variant,
            sum(len(one["score"]) for one in mine),
            values,
            share=1.0 if full is None else values["bytes"] / average(one["bytes"] for one in full),
            against_full={} if variant.is_full else against(full),
            against_drop=against(of(variant.dropping)) if variant.merges else {},
        )

    def rows(self, tasks: Sequence[str], length: int) -> list[Row]:
        """Every cache on these tasks, in the order of the sweep."""
        found = (self.row(tasks, length, variant) for variant in self.variants.values())
        return [row for row in found if row is not None]

    def best(self, tasks: Sequence[str], length: int) -> list[Row]:
        """The caches than which none of as many bytes (in percent) or fewer has a smaller loss, largest first."""
        found: list[Row] = []
        for row in sorted(self.rows(tasks, length), key=lambda row: (round(row.share, 2), row.values["loss"])):
            if not found or row.values["loss"] < found[-1].values["loss"]:
                found.append(row)
        return found[::-1]

    def by_merger(self, tasks: Sequence[str], length: int) -> dict[str, dict[str, dict[str, Row]]]:
        """Every cache on these tasks but the full one: by its size, by how it chooses, and by its merger."""
        found: dict[str, dict[str, dict[str, Row]]] = {}
        for row in self.rows(tasks, length):
            if not row.variant.is_full:
                how = row.variant.how
                chooses = " ".join(part for name, part in how.items() if part and name not in ("merger", "size"))
                size = how["size"] + " evicted" * how["size"].endswith("%") or "as the scores have it"
                found.setdefault(size, {}).setdefault(chooses, {})[how["merger"]] = row
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it: the setting, then a row for each cell and for each cache over all tasks."""
        of_tasks, of_all = [], []
        for length, tasks in self.tasks.items():
            of_tasks += [row.to_dict() for task in tasks for row in self.rows([task], length)]
            if len(tasks) > 1:
                of_all += [row.to_dict() for row in self.rows(tasks, length)]
        return {"setting": self.setting, "over_all_tasks": of_all, "by_task": of_tasks}
