"""A summary as Markdown."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from .config import Variant
from .summary import Row, Summary

MOST_LISTED = 100  # caches of which each has a row


def markdown(summary: Summary) -> str:
    """Tables for every context length: each cache over all tasks, then its scores and losses task by task.

    Of a sweep of more than `MOST_LISTED` caches these tables show the best for their bytes, and others the loss of all
    of them.
    """
    parts = []
    for length, tasks in summary.tasks.items():
        named = f"{len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
        rows, shown = summary.rows(tasks, length), ""
        if is_large := len(rows) > MOST_LISTED:
            shown = f"; of {len(rows):,} caches those than which none loses less with as many bytes or fewer"
            rows = summary.best(tasks, length)
        if rows:
            parts += section(f"{named} of {length:,} tokens, {how_many(summary, tasks, length)}{shown}", table(rows))
        if len(tasks) > 1:
            listed = [row.variant for row in rows] if is_large else list(summary.variants.values())
            for name, what in (
                ("score", "Scores (more is better)"),
                ("loss", "Losses, nats for a token (less is better)"),
            ):
                parts += section(f"{what} by task, {length:,} tokens", by_task(summary, length, name, listed))
        if is_large:
            for size, of_size in summary.by_merger(tasks, length).items():
                title = f"{size}: loss added to the full cache's by merger, {length:,} tokens (bold: the least)"
                parts += section(title, by_merger(of_size))
    return "\n".join(parts)


def section(title: str, lines: Iterable[str]) -> list[str]:
    """A table under its title."""
    return [f"### {title}\n", "\n".join(lines) + "\n"]


def how_many(summary: Summary, tasks: Sequence[str], length: int) -> str:
    """How many examples there are."""
    counts = {len(summary.indices[task, length]) for task in tasks}
    named = " or ".join(str(count) for count in sorted(counts))
    return f"{named} example{'' if named == '1' else 's'}{' of each' if len(tasks) > 1 else ''}"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A row for each cache: what it answers, how sure it is of the right answers, and what it costs."""
    decodes = any("decoding_seconds" in row.values for row in rows)
    head = ["cache", "score", "loss", "KL", "score against full", "loss against full", "score against drop"]
    head += ["loss against drop", "bytes", "share", "reading, s", "fold, s"] + ["decoding, s"] * decodes
    yield line([*head, "merged", "dropped"])
    yield "|---" * (len(head) + 2) + "|"
    for row in rows:
        values = row.values
        cells = [row.variant.label, *(f"{values[name]:.3f}" for name in ("score", "loss", "kl"))]
        for differences in (row.against_full, row.against_drop):
            cells += [differences[name].text(3) if name in differences else "" for name in ("score", "loss")]
        cells += [f"{values['bytes']:,.0f}", f"{row.share:.2f}"]
        cells += [f"{values[name]:.3f}" for name in ("reading_seconds", "fold_seconds")]
        cells += [f"{values.get('decoding_seconds', 0):.3f}"] if decodes else []
        yield line([*cells, f"{values['merged']:,.0f}", f"{values['dropped']:,.0f}"])


def by_task(summary: Summary, length: int, name: str, variants: Sequence[Variant]) -> Iterator[str]:
    """A row for each cache, a column for each task: the mean of what is called `name`."""
    tasks = summary.tasks[length]
    yield line(["cache", *tasks])
    yield "|---" * (len(tasks) + 1) + "|"
    for variant in variants:
        rows = [summary.row([task], length, variant) for task in tasks]
        if any(row is not None for row in rows):
            yield line([variant.label, *("" if row is None else f"{row.values[name]:.2f}" for row in rows)])


def by_merger(rows: Mapping[str, Mapping[str, Row]]) -> Iterator[str]:
    """A row for each way to choose, a column for each merger: by how much its loss is above the full cache's."""
    mergers = list(dict.fromkeys(merger for row in rows.values() for merger in row))
    yield line(["", *mergers])
    yield "|---" * (len(mergers) + 1) + "|"
    for chooses, found in rows.items():
        added = {name: row.against_full["loss"].mean for name, row in found.items() if row.against_full}
        least = min(added.values(), default=None)
        cells = [f"{added[name]:+.2f}" if name in added else "" for name in mergers]
        yield line(
            [
                chooses,
                *(
                    f"**{cell}**" if added.get(name) == least else cell
                    for name, cell in zip(mergers, cells, strict=True)
                ),
            ]
        )


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
