"""A summary as one HTML page that needs nothing else: tables, pictures, and what the caches answered."""

import io
import re
from typing import Any

from ..report import render
from .example import Example
from .summary import Summary

ANSWERS_SHOWN = 2  # examples of each task of which the answers are shown


def report_page(
    summary: Summary,
    figures: dict[str, Any],
    examples: dict[tuple[str, int], list[list[Example]]],
    title: str,
    facts: str,
) -> str:
    """The page.

    Args:
        summary: what was measured.
        figures: matplotlib's, by name; none where it is not installed.
        examples: by task and length, for their answers.
        title, facts: what was evaluated, and how.
    """
    sections = []
    for length, tasks in summary.tasks.items():
        answers = []
        for task in tasks:
            for number, index in enumerate(summary.indices[task, length][:ANSWERS_SHOWN]):
                shown = examples.get((task, length), [])[index : index + 1]
                given = []
                for variant in summary.variants.values():
                    measured = summary.measured(task, length, variant)
                    if measured is not None and "prediction" in measured:
                        given.append((variant.label, measured["prediction"][number], measured["score"][number]))
                if shown and given:
                    answers.append({"task": task, "example": shown[0][0], "given": given})
        by_task = [
            (variant, [summary.row([task], length, variant) for task in tasks]) for variant in summary.variants.values()
        ]
        sections.append(
            {
                "length": length,
                "tasks": tasks,
                "rows": summary.rows(tasks, length),
                "by_task": by_task,
                "figures": [svg(figure) for name, figure in figures.items() if f"_{length}." in name],
                "answers": answers,
            }
        )
    return render(__package__, "page.html", title=title, facts=facts, sections=sections)


def svg(figure: Any) -> str:
    """A figure as SVG to stand inside a page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "merging_cache"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), count=1, flags=re.DOTALL)
