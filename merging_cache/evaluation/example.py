"""One question about one context: what every task makes and every cache is asked."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One question about one context.

    Args:
        task: the name of the task.
        context: what the cache reads and folds.
        question: what is asked after it; `None` where the text simply goes on, in nobody else's words.
        answer_prefix: how the answer begins.
        answers: strings that a right answer contains, all or any of them (see `metrics.py`).
        max_new_tokens: how long the answer may be.
        depths: of every needle that is asked for, how much of the haystack comes before it, in [0, 1].
        reference: a right answer as it stands behind `answer_prefix`, of which the loss is taken.
    """

    task: str
    context: str
    question: str | None
    answer_prefix: str
    answers: list[str]
    max_new_tokens: int
    depths: tuple[float, ...] = ()
    reference: str = ""

    @property
    def prompt(self) -> str:
        """All that the model reads before it answers."""
        return self.context + (self.question or "") + self.answer_prefix
