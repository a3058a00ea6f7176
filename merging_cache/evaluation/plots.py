"""Pictures: scores against bytes, and what merging gains task by task. Needs matplotlib."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..report import new_figure
from .config import Variant
from .summary import Summary


def heat_map(
    panel: Any,
    table: Tensor,
    is_sure: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limit: float,
    colours: str = "RdBu",
    number: str = "+.2f",
) -> None:
    """Numbers `[rows, columns]` on colours that saturate at `-limit` and `limit`; bold where `is_sure`."""
    panel.imshow(table.numpy(), cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
    for row, column in itertools.product(range(len(rows)), range(len(columns))):
        value = table[row, column].item()
        weight = "bold" if is_sure[row, column] else "normal"
        colour = "white" if abs(value) > 0.7 * limit else "black"
        style = {"ha": "center", "va": "center", "fontsize": 7, "fontweight": weight, "color": colour}
        panel.text(column, row, format(value, number), **style)
    panel.set_yticks(range(len(rows)), rows, fontsize=8)
    panel.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)


def hue_of(variant: Variant) -> tuple[str, ...]:
    """What caches of one colour have in common: all but the merger and the size."""
    return tuple(variant.how[part] for part in ("scorer", "budget", "quantize"))


def score_against_bytes(summary: Summary, length: int) -> Any:
    """A figure: for every way to choose and merge, its mean score over its share of the full cache's bytes."""
    figure, (panel,) = new_figure(8, 5)
    rows = summary.rows(summary.questions(length), length)
    families: dict[str, list] = {}
    for row in rows:
        if row.variant.is_full:
            panel.axhline(row.values["score"], color="0.6", linestyle=":", linewidth=1)
            panel.plot([row.share], [row.values["score"]], "*", color="black", markersize=12, label="full cache")
        else:
            how = row.variant.how
            families.setdefault(" ".join(v for k, v in how.items() if v and k != "size"), []).append(row)
    hues = list(dict.fromkeys(hue_of(row.variant) for row in rows if not row.variant.is_full))
    mergers = list(dict.fromkeys(row.variant.how["merger"] for row in rows if not row.variant.is_full))
    for name, members in families.items():
        members.sort(key=lambda row: row.share)
        how = members[0].variant.how
        panel.plot(
            [row.share for row in members],
            [row.values["score"] for row in members],
            color=f"C{hues.index(hue_of(members[0].variant)) % 10}",
            linestyle=["--", "-", "-.", ":"][mergers.index(how["merger"]) % 4],
            marker="xos^vD"[mergers.index(how["merger"]) % 6],
            markersize=5,
            label=name,
        )
    panel.set_xlabel("bytes of the cache, as a share of the full cache's")
    panel.set_ylabel("mean score")
    panel.set_title(f"{len(summary.questions(length))} tasks of {length:,} tokens", fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7, loc="lower right")
    return figure


def gain_by_task(summary: Summary, length: int) -> Any | None:
    """A figure: what every merger gains over dropping on every task; `None` where nothing was merged."""
    questions = summary.questions(length)
    merging = [one for one in summary.variants.values() if one.merges]
    found = {one.label: [summary.row([task], length, one) for task in questions] for one in merging}
    # of a sweep that was stopped, the tasks that are complete
    done = [all(rows[i] is not None and rows[i].gained for rows in found.values()) for i in range(len(questions))]
    questions = list(itertools.compress(questions, done))
    found = {label: list(itertools.compress(rows, done)) for label, rows in found.items()}
    if not found or not questions:
        return None
    figure, (panel,) = new_figure(2.6 + 0.62 * len(questions), 1.4 + 0.3 * len(found))
    heat_map(
        panel,
        torch.tensor([[row.gained.mean for row in rows] for rows in found.values()]),
        torch.tensor([[row.gained.is_sure for row in rows] for rows in found.values()]),
        list(found),
        questions,
        limit=0.3,
    )
    panel.set_title(f"score gained over dropping, {length:,} tokens (bold: the 95% interval leaves out 0)", fontsize=10)
    return figure


def save_plots(summary: Summary, folder: Path) -> dict[str, Any]:
    """Save all pictures as PNG; returns the figures by the names of their files."""
    figures = {}
    for length in summary.tasks:
        if summary.questions(length):
            figures[f"score_against_bytes_{length}.png"] = score_against_bytes(summary, length)
            figures[f"gain_by_task_{length}.png"] = gain_by_task(summary, length)
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier run, and true no more
        else:
            figure.savefig(folder / name, dpi=110)
    return {name: figure for name, figure in figures.items() if figure is not None}
