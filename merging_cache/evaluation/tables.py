"""A summary as Markdown."""

from collections.abc import Iterator, Sequence

from .config import TEXT
from .summary import Row, Summary


def markdown(summary: Summary) -> str:
    """Tables for every context length: each cache over all tasks, then task by task, then on running text."""
    parts = []
    for length in summary.tasks:
        questions = summary.questions(length)
        if questions:
            named = f"{len(questions)} tasks" if len(questions) > 1 else questions[0]
            rows = summary.rows(questions, length)
            parts.append(f"### {named} of {length:,} tokens, {how_many(summary, questions, length)}\n")
            parts.append("\n".join(table(rows)) + "\n")
        if len(questions) > 1:
            parts.append(f"### Scores by task, {length:,} tokens\n\n" + "\n".join(by_task(summary, length)) + "\n")
        if TEXT in summary.tasks[length]:
            parts.append(f"### What follows {length:,} tokens of text\n\n")
            parts[-1] += "\n".join(table(summary.rows([TEXT], length))) + "\n"
    return "\n".join(parts)


def how_many(summary: Summary, tasks: Sequence[str], length: int) -> str:
    """How many examples there are."""
    counts = {summary.rows([task], length)[0].examples for task in tasks}
    named = " or ".join(str(count) for count in sorted(counts))
    return f"{named} example{'' if named == '1' else 's'}{' of each' if len(tasks) > 1 else ''}"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A row for each cache: what it answers and what it costs."""
    is_text = TEXT in rows[0].tasks
    digits = 3
    head = ["cache", "loss, nats (less is better)" if is_text else "score"] + ["KL from full cache, nats"] * is_text
    head += ["against full cache", "gain over drop", "bytes", "share", "prefill, s"]
    head += ["decoding, s"] * (not is_text) + ["merged", "dropped"]
    yield line(head)
    yield "|---" * len(head) + "|"
    for row in rows:
        values = row.values
        cells = [row.variant.label, f"{values['loss' if is_text else 'score']:.{digits}f}"]
        cells += [f"{values['kl']:.{digits}f}"] if is_text else []
        cells += ["" if one is None else one.text(digits) for one in (row.lost, row.gained)]
        cells += [f"{values['bytes']:,.0f}", f"{row.share:.2f}", f"{values['prefill_seconds']:.3f}"]
        cells += [] if is_text else [f"{values['decoding_seconds']:.3f}"]
        yield line([*cells, f"{values['merged']:,.0f}", f"{values['dropped']:,.0f}"])


def by_task(summary: Summary, length: int) -> Iterator[str]:
    """A row for each cache, a column for each task."""
    questions = summary.questions(length)
    yield line(["cache", *questions])
    yield "|---" * (len(questions) + 1) + "|"
    for variant in summary.variants.values():
        rows = [summary.row([task], length, variant) for task in questions]
        if any(row is not None for row in rows):
            yield line([variant.label, *("" if row is None else f"{row.values['score']:.2f}" for row in rows)])


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"
