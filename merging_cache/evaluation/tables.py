"""A summary as Markdown."""

from collections.abc import Iterator, Sequence

from .summary import Row, Summary


def markdown(summary: Summary) -> str:
    """Tables for every context length: each cache over all tasks, then its scores and losses task by task."""
    parts = []
    for length, tasks in summary.tasks.items():
        named = f"{len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
        rows = summary.rows(tasks, length)
        if rows:
            parts.append(f"### {named} of {length:,} tokens, {how_many(summary, tasks, length)}\n")
            parts.append("\n".join(table(rows)) + "\n")
        if len(tasks) > 1:
            for name, what in (
                ("score", "Scores (more is better)"),
                ("loss", "Losses, nats for a token (less is better)"),
            ):
                parts.append(
                    f"### {what} by task, {length:,} tokens\n\n" + "\n".join(by_task(summary, length, name)) + "\n"
                )
    return "\n".join(parts)


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


def by_task(summary: Summary, length: int, name: str) -> Iterator[str]:
    """A row for each cache, a column for each task: the mean of what is called `name`."""
    tasks = summary.tasks[length]
    yield line(["cache", *tasks])
    yield "|---" * (len(tasks) + 1) + "|"
    for variant in summary.variants.values():
        rows = [summary.row([task], length, variant) for task in tasks]
        if any(row is not None for row in rows):
            yield line([variant.label, *("" if row is None else f"{row.values[name]:.2f}" for row in rows)])


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
