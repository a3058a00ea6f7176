"""What a cache costs in answers: RULER's tasks and running text, with any cache of a sweep, on any model."""

from .config import EvaluationConfig, Variant
from .example import Example
from .ruler import RULER
from .run import Evaluation
from .summary import Summary

__all__ = ["RULER", "Evaluation", "EvaluationConfig", "Example", "Summary", "Variant"]
