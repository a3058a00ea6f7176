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

MOST_IN_LEGEND = 40  # lines of a picture that can still be told apart by a list
MOST_ROWS = 200  # of a heat map


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


# what a figure shows: the name of the measure, how it is called, and whether more of it is better
MEASURES = {"score": ("mean score", 1), "loss": ("loss of the right answers, nats for a token", -1)}


def against_bytes(summary: Summary, length: int, name: str) -> Any:
    """A figure: for every way to choose and merge, its mean score or loss over its share of the full cache's bytes."""
    figure, (panel,) = new_figure(8, 5)
    rows = summary.rows(summary.tasks[length], length)
    families: dict[str, list] = {}
    for row in rows:
        if row.variant.is_full:
            panel.axhline(row.values[name], color="0.6", linestyle=":", linewidth=1)
            panel.plot([row.share], [row.values[name]], "*", color="black", markersize=12, label="full cache")
        else:
            how = row.variant.how
            families.setdefault(" ".join(v for k, v in how.items() if v and k != "size"), []).append(row)
    hues = list(dict.fromkeys(hue_of(row.variant) for row in rows if not row.variant.is_full))
    mergers = list(dict.fromkeys(row.variant.how["merger"] for row in rows if not row.variant.is_full))
    for label, members in families.items():
        members.sort(key=lambda row: row.share)
        how = members[0].variant.how
        panel.plot(
            [row.share for row in members],
            [row.values[name] for row in members],
            color=f"C{hues.index(hue_of(members[0].variant)) % 10}",
            linestyle=["--", "-", "-.", ":"][mergers.index(how["merger"]) % 4],
            marker="xos^vD"[mergers.index(how["merger"]) % 6],
            markersize=5,
            label=label,
        )
    panel.set_xlabel("bytes of the cache, as a share of the full cache's")
    panel.set_ylabel(MEASURES[name][0])
    panel.set_title(
        f"{', '.join(summary.tasks[length][:4])}{' …' * (len(summary.tasks[length]) > 4)}: {length:,} tokens",
        fontsize=10,
    )
    panel.grid(alpha=0.3)
    if len(families) <= MOST_IN_LEGEND:
        panel.legend(fontsize=7)
    return figure


def gain_by_task(summary: Summary, length: int, name: str) -> Any | None:
    """A figure: what every merger gains over dropping on every task; `None` where nothing was merged."""
    tasks = summary.tasks[length]
    merging = [one for one in summary.variants.values() if one.merges]
    found = {one.label: [summary.row([task], length, one) for task in tasks] for one in merging}
    # of a sweep that was stopped, the tasks that are complete
    done = [all(rows[i] is not None and rows[i].against_drop for rows in found.values()) for i in range(len(tasks))]
    tasks = list(itertools.compress(tasks, done))
    found = {label: list(itertools.compress(rows, done)) for label, rows in found.items()}
    if not found or not tasks or len(found) > MOST_ROWS:
        return None
    sign = MEASURES[name][1]
    differences = [[row.against_drop[name] for row in rows] for rows in found.values()]
    figure, (panel,) = new_figure(2.6 + 0.62 * len(tasks), 1.4 + 0.3 * len(found))
    heat_map(
        panel,
        torch.tensor([[sign * one.mean for one in of_cache] for of_cache in differences]),
        torch.tensor([[one.is_sure for one in of_cache] for of_cache in differences]),
        list(found),
        tasks,
        limit=0.3,
    )
    panel.set_title(
        f"{name} gained over dropping, {length:,} tokens (bold: the 95% interval leaves out 0)", fontsize=10
    )
    return figure


def save_plots(summary: Summary, folder: Path) -> dict[str, Any]:
    """Save all pictures as PNG; returns the figures by the names of their files."""
    figures = {}
    for length in summary.tasks:
        for name in MEASURES:
            figures[f"{name}_against_bytes_{length}.png"] = against_bytes(summary, length, name)
            figures[f"{name}_gain_by_task_{length}.png"] = gain_by_task(summary, length, name)
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier run, and true no more
        else:
            figure.savefig(folder / name, dpi=110)
    return {name: figure for name, figure in figures.items() if figure is not None}
