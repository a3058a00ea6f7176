"""Pictures: scores against bytes, what merging gains task by task, and every way to choose with every merger."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..report import new_figure
from .config import Variant
from .summary import Row, Summary

MOST_IN_LEGEND = 40  # lines of a picture that can still be told apart by a list
MOST_ROWS = 200  # of a heat map
SHOWN = 0.9  # share of the numbers that a picture's scale has room for: some mergers fail by far


def heat_map(
    panel: Any,
    table: Tensor,
    is_bold: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limit: float,
    colours: str = "RdBu",
    number: str = "+.2f",
) -> None:
    """Numbers `[rows, columns]`, NaN for none, on colours that saturate at `-limit` and `limit`; some are bold."""
    panel.imshow(table.numpy(), cmap=colours, vmin=-limit, vmax=limit, aspect="auto")
    for row, column in itertools.product(range(len(rows)), range(len(columns))):
        value = table[row, column].item()
        if math.isnan(value):
            continue
        weight = "bold" if is_bold[row, column] else "normal"
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
    if len(families) <= MOST_IN_LEGEND:
        draw_families(panel, families, name)
        panel.legend(fontsize=7)
    else:
        draw_best(panel, rows, summary.best(summary.tasks[length], length), name)
    panel.set_xlabel("bytes of the cache, as a share of the full cache's")
    panel.set_ylabel(MEASURES[name][0])
    panel.set_title(
        f"{', '.join(summary.tasks[length][:4])}{' …' * (len(summary.tasks[length]) > 4)}: {length:,} tokens",
        fontsize=10,
    )
    panel.grid(alpha=0.3)
    return figure


def draw_families(panel: Any, families: dict[str, list[Row]], name: str) -> None:
    """A line for each way to choose and merge, over its sizes."""
    variants = [row.variant for members in families.values() for row in members]
    hues = list(dict.fromkeys(hue_of(variant) for variant in variants))
    mergers = list(dict.fromkeys(variant.how["merger"] for variant in variants))
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


def draw_best(panel: Any, rows: list[Row], best: list[Row], name: str) -> None:
    """A dot for each cache, and the names of the best."""
    others = [row for row in rows if not row.variant.is_full]
    panel.plot([row.share for row in others], [row.values[name] for row in others], ".", color="0.75", markersize=3)
    panel.plot([row.share for row in best], [row.values[name] for row in best], "o-", color="C0", markersize=5)
    for row in best:
        if not row.variant.is_full:
            at = (row.share, row.values[name])
            panel.annotate(row.variant.label, at, xytext=(5, 3), textcoords="offset points", fontsize=7)
    values = sorted(MEASURES[name][1] * row.values[name] for row in rows)  # worst first
    shown = [MEASURES[name][1] * values[int((1 - SHOWN) * len(values))], MEASURES[name][1] * values[-1]]
    panel.set_ylim(min(shown) - 0.05 * abs(shown[0] - shown[1]), max(shown) + 0.05 * abs(shown[0] - shown[1]))


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


def by_merger(summary: Summary, length: int, name: str) -> Any | None:
    """A figure: the score or loss of every way to choose with every merger, less that of the full cache, by size.

    `None` where there are no two of each.
    """
    of_sizes = summary.by_merger(summary.tasks[length], length)
    choosing = list(dict.fromkeys(chooses for of_size in of_sizes.values() for chooses in of_size))
    mergers = list(dict.fromkeys(one for of_size in of_sizes.values() for row in of_size.values() for one in row))
    if len(choosing) < 2 or len(mergers) < 2 or len(choosing) > MOST_ROWS:
        return None
    nothing = float("nan")
    tables = {
        size: torch.tensor(
            [
                [
                    row[one].against_full[name].mean if one in row and row[one].against_full else nothing
                    for one in mergers
                ]
                for row in (of_size.get(chooses, {}) for chooses in choosing)
            ]
        )
        for size, of_size in of_sizes.items()
    }
    sizes = sorted(tables, key=lambda size: tables[size].nanmedian().abs().item())
    limit = torch.cat(list(tables.values())).abs().nanquantile(SHOWN).item() or 1
    figure, panels = new_figure(2 + 0.5 * len(mergers) * len(sizes), 1.6 + 0.25 * len(choosing), columns=len(sizes))
    for panel, size in zip(panels, sizes, strict=True):
        table = tables[size]
        best = (MEASURES[name][1] * table).nan_to_num(-torch.inf)
        names = choosing if panel is panels[0] else [""] * len(choosing)
        colours = "RdBu" if MEASURES[name][1] > 0 else "RdBu_r"
        heat_map(panel, table, best == best.max(), names, mergers, limit=limit, colours=colours)
        panel.set_title(size, fontsize=10)
    figure.suptitle(
        f"{MEASURES[name][0]}, less the full cache's: {length:,} tokens (bold: the best of its panel)", fontsize=11
    )
    return figure


def save_plots(summary: Summary, folder: Path) -> dict[str, Any]:
    """Save all pictures as PNG; returns the figures by the names of their files."""
    figures = {}
    for length in summary.tasks:
        for name in MEASURES:
            figures[f"{name}_against_bytes_{length}.png"] = against_bytes(summary, length, name)
            figures[f"{name}_gain_by_task_{length}.png"] = gain_by_task(summary, length, name)
            figures[f"{name}_by_merger_{length}.png"] = by_merger(summary, length, name)
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier run, and true no more
        else:
            figure.savefig(folder / name, dpi=110)
    return {name: figure for name, figure in figures.items() if figure is not None}
