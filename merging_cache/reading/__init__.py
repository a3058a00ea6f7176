"""Reading a context once and filling many caches from it, and what each of them then loses."""

from .compare import FULL, ComparedCache, Comparison, around_question, compare
from .continuation import Continuation, agrees, answer, divergence, loss, predict, release, rows_of
from .reading import Reading, check_length, clock

__all__ = [
    "FULL",
    "ComparedCache",
    "Comparison",
    "Continuation",
    "Reading",
    "agrees",
    "answer",
    "around_question",
    "check_length",
    "clock",
    "compare",
    "divergence",
    "loss",
    "predict",
    "release",
    "rows_of",
]
