"""What a cache kept, merged and saved: a record that prints as a table."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..budgets import BUDGETS
from ..fold import Fold
from ..layers import MergingLayer
from ..mergers import MERGERS, QUERY_SOURCES
from ..scorers import SCORERS
from ..stage import summarize_stage
from .picture import plot_merges

COLUMNS = ("layer", "kind", "seen", "slots", "merged", "dropped", "bytes", "DynamicCache", "share")
COLUMNS += ("scorer", "budget", "merger")


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache, or all of them together.

    Args:
        layer: the layer's index, or `"all"`.
        kind: `"folding"`, or for layers that stay transformers' own the name of their class.
        tokens_seen: tokens of every row, padding included.
        slots: keys stored per row and head, the tail included: the mean, rounded, where heads have different numbers.
        tokens_merged, tokens_dropped: evicted tokens that were folded into a survivor, and that were not: the mean over
            rows and heads. A token counts as merged once it was, unless slots have mass: then those that a later fold
            drops with their slot count as dropped.
        bytes_now: bytes held, positions and scales included.
        bytes_full: bytes that `DynamicCache` would hold.
        scorer, budget, merger: what is important, how slots are shared, and what becomes of the evicted, with the
            options that are not their defaults; `"-"` where nothing folds.
    """

    layer: int | str
    kind: str
    tokens_seen: int
    slots: int
    tokens_merged: float
    tokens_dropped: float
    bytes_now: int
    bytes_full: int
    scorer: str = ""
    budget: str = ""
    merger: str = ""

    def cells(self) -> list[str]:
        """The row of the table."""
        return [
            str(self.layer),
            self.kind,
            f"{self.tokens_seen:,}",
            f"{self.slots:,}",
            f"{self.tokens_merged:,.1f}",
            f"{self.tokens_dropped:,.1f}",
            f"{self.bytes_now:,}",
            f"{self.bytes_full:,}",
            f"{self.bytes_now / self.bytes_full:.3f}" if self.bytes_full else "-",
            self.scorer,
            self.budget,
            self.merger,
        ]


@dataclass(frozen=True)
class CacheReport:
    """A row for each layer of a cache and one for all; `print` it for a table.

    Args:
        layers: the layers in order.
        total: sums over the layers; `tokens_seen` is that of one row through the whole model.
        advice: what the cache would do if it were given the model, where it was given the config only.
        fallbacks: what stages had to do without in some layers, and why.
        cache: a weak reference to what it is about, for `plot`: a report keeps no cache alive.
    """

    layers: tuple[LayerReport, ...]
    total: LayerReport
    advice: str = field(default="", compare=False)
    fallbacks: tuple[str, ...] = field(default=(), compare=False)
    cache: weakref.ref | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheReport, (
            self.layers,
            self.total,
            self.advice,
            self.fallbacks,
        )  # copied or pickled it is a record and nothing else

    def __str__(self) -> str:
        lines = align([list(COLUMNS), *(row.cells() for row in (*self.layers, self.total))], left=2)
        rule = "-" * len(lines[0])
        notes = [*self.fallbacks, *filter(None, [self.advice])]
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *notes])

    def plot(self, tokens: Sequence[str] | None = None, row: int = 0) -> Any:
        """A matplotlib figure of which tokens survived and where the others went; see `plot_merges`.

        Raises:
            ValueError: if the cache is gone since the report was made, or would give another one now.
        """
        cache = None if self.cache is None else self.cache()
        if cache is None or report_layers(cache.layers) != self:
            raise ValueError("the cache is not what it was at this report; plot a new one: cache.report().plot()")
        return plot_merges(cache, tokens, row=row)


def report_layers(layers: Sequence[Any], cache: Any = None, with_model: Fold | None = None) -> CacheReport:
    """Report on the layers of a cache; those that are transformers' own count in full.

    Args:
        layers: of the cache.
        cache: the cache itself, for pictures.
        with_model: how it would fold if it were given the model, where that is in another way.
    """
    rows = tuple(report_layer(index, layer) for index, layer in enumerate(layers))
    total = LayerReport(
        layer="all",
        kind="",
        tokens_seen=max((row.tokens_seen for row in rows), default=0),
        slots=sum(row.slots for row in rows),
        tokens_merged=sum(row.tokens_merged for row in rows),
        tokens_dropped=sum(row.tokens_dropped for row in rows),
        bytes_now=sum(row.bytes_now for row in rows),
        bytes_full=sum(row.bytes_full for row in rows),
    )
    advice = ""
    if with_model is not None:
        scorer, budget = summarize_stage(with_model.scorer, SCORERS), summarize_stage(with_model.budget, BUDGETS)
        merger = summarize_stage(with_model.merger, MERGERS | QUERY_SOURCES)
        stages = f"{scorer}, {budget} and {merger}"
        advice = f"Given the config only. With model=model it would go by {stages}; the defaults answer far better so."
    return CacheReport(rows, total, advice, fallbacks_of(layers), None if cache is None else weakref.ref(cache))


def fallbacks_of(layers: Sequence[Any]) -> tuple[str, ...]:
    """What stages had to do without, each with the layers where they had to."""
    where: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        for fallback in layer.fallbacks if isinstance(layer, MergingLayer) else ():
            where.setdefault(fallback, []).append(index)
    folding = [index for index, layer in enumerate(layers) if isinstance(layer, MergingLayer)]
    return tuple(
        fallback if found == folding else f"{fallback} (layers {', '.join(map(str, found))})"
        for fallback, found in where.items()
    )


def report_layer(index: int, layer: Any) -> LayerReport:
    """One layer, ours or transformers' own."""
    if isinstance(layer, MergingLayer):
        return LayerReport(
            layer=index,
            kind="folding",
            tokens_seen=layer.seen,
            slots=round(mean_count(layer.stored_per_head)),
            tokens_merged=mean_count(layer.num_merged),
            tokens_dropped=mean_count(layer.num_dropped),
            bytes_now=layer.nbytes,
            bytes_full=layer.full_nbytes,
            scorer="-" if layer.scorer is None else summarize_stage(layer.scorer, SCORERS),
            budget="-" if layer.budget is None else summarize_stage(layer.budget, BUDGETS),
            merger="-" if layer.merger is None else summarize_stage(layer.merger, MERGERS | QUERY_SOURCES),
        )
    nbytes = sum(tensor.nbytes for tensor in held_tensors(layer))
    keys = getattr(layer, "keys", None)
    stored = keys.shape[-2] if keys is not None and keys.dim() == 4 else 0
    seen = layer.get_seq_length() if stored else 0
    return LayerReport(index, type(layer).__name__, seen, stored, 0.0, 0.0, nbytes, nbytes, "-", "-", "-")


def held_tensors(layer: Any) -> list[Tensor]:
    """The tensors among a layer's attributes; linear-attention layers keep theirs in dicts."""
    values = list(vars(layer).values())
    values += [state for value in values if isinstance(value, dict) for state in value.values()]
    return [value for value in values if isinstance(value, Tensor)]


def mean_count(counts: Tensor | None) -> float:
    """The mean over rows and heads; 0 before the first fold."""
    return 0.0 if counts is None else counts.float().mean().item()


def align(table: Sequence[Sequence[str]], left: int) -> list[str]:
    """The rows of a table as lines: its first `left` columns aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
