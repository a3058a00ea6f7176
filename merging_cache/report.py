"""What a cache kept, merged and saved: a record that prints as a table."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .layer import MergingLayer


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache.

    Args:
        layer: its index.
        kind: `"folding"`, or for layers that stay transformers' own the name of their class.
        tokens_seen: tokens of every row, padding included.
        slots: keys stored per row and head, the tail included.
        tokens_merged, tokens_dropped: evicted tokens that were folded into a survivor, and that were not: the mean over
            rows and heads.
        bytes_now: bytes held, positions and scales included.
        bytes_full: bytes that `DynamicCache` would hold.
    """

    layer: int
    kind: str
    tokens_seen: int
    slots: int
    tokens_merged: float
    tokens_dropped: float
    bytes_now: int
    bytes_full: int


@dataclass(frozen=True)
class CacheReport:
    """All layers of a cache, and their totals; `print` it for a table."""

    layers: tuple[LayerReport, ...]

    @property
    def tokens_seen(self) -> int:
        """Tokens seen by each row."""
        return max((layer.tokens_seen for layer in self.layers), default=0)

    @property
    def slots(self) -> int:
        """Keys stored per row and head, over all layers."""
        return sum(layer.slots for layer in self.layers)

    @property
    def tokens_merged(self) -> float:
        """Tokens folded into survivors per row and head, over all layers."""
        return sum(layer.tokens_merged for layer in self.layers)

    @property
    def tokens_dropped(self) -> float:
        """Tokens evicted and not folded per row and head, over all layers."""
        return sum(layer.tokens_dropped for layer in self.layers)

    @property
    def bytes_now(self) -> int:
        """Bytes held."""
        return sum(layer.bytes_now for layer in self.layers)

    @property
    def bytes_full(self) -> int:
        """Bytes that `DynamicCache` would hold."""
        return sum(layer.bytes_full for layer in self.layers)

    def __str__(self) -> str:
        head = ("layer", "kind", "seen", "slots", "merged", "dropped", "bytes", "DynamicCache", "share")
        rows = [
            self._row(
                str(row.layer),
                row.kind,
                row.tokens_seen,
                row.slots,
                row.tokens_merged,
                row.tokens_dropped,
                row.bytes_now,
                row.bytes_full,
            )
            for row in self.layers
        ]
        total = self._row(
            "all",
            "",
            self.tokens_seen,
            self.slots,
            self.tokens_merged,
            self.tokens_dropped,
            self.bytes_now,
            self.bytes_full,
        )
        table = [head, *rows, total]
        widths = [max(len(line[column]) for line in table) for column in range(len(head))]
        left = (0, 1)
        lines = [
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in table
        ]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])

    @staticmethod
    def _row(
        layer: str, kind: str, seen: int, slots: int, merged: float, dropped: float, now: int, full: int
    ) -> tuple[str, ...]:
        share = f"{now / full:.3f}" if full else "-"
        return (
            layer,
            kind,
            f"{seen:,}",
            f"{slots:,}",
            f"{merged:,.1f}",
            f"{dropped:,.1f}",
            f"{now:,}",
            f"{full:,}",
            share,
        )


def report_layers(layers: Iterable[Any]) -> CacheReport:
    """Report on the layers of a cache; those that are transformers' own count in full."""
    return CacheReport(tuple(report_layer(index, layer) for index, layer in enumerate(layers)))


def report_layer(index: int, layer: Any) -> LayerReport:
    if isinstance(layer, MergingLayer):
        return LayerReport(
            layer=index,
            kind="folding",
            tokens_seen=layer.seen,
            slots=layer.num_stored,
            tokens_merged=mean_count(layer.num_merged),
            tokens_dropped=mean_count(layer.num_dropped),
            bytes_now=layer.nbytes,
            bytes_full=layer.full_nbytes,
        )
    held = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    held += [
        state
        for value in vars(layer).values()
        if isinstance(value, dict)
        for state in value.values()
        if isinstance(state, Tensor)
    ]
    nbytes = sum(tensor.nbytes for tensor in held)
    keys = getattr(layer, "keys", None)
    stored = keys.shape[-2] if keys is not None and keys.dim() == 4 else 0
    seen = layer.get_seq_length() if stored else 0
    return LayerReport(index, type(layer).__name__, seen, stored, 0.0, 0.0, nbytes, nbytes)


def mean_count(counts: Tensor | None) -> float:
    return 0.0 if counts is None else counts.float().mean().item()
