"""Scorers: how important each token is. `SCORERS` is the table of their names; adding one is a file and a line here."""

from .base import FunctionScorer, Scorer
from .cur import CURScorer
from .keydiff import KeyDiffScorer
from .knorm import KnormScorer
from .lagkv import LagKVScorer
from .random import RandomScorer
from .snapkv import SnapKVScorer
from .streaming_llm import StreamingLLMScorer
from .tova import TOVAScorer
from .value_norm import ValueNormScorer

SCORERS: dict[str, type[Scorer]] = {
    "cur": CURScorer,
    "keydiff": KeyDiffScorer,
    "knorm": KnormScorer,
    "lagkv": LagKVScorer,
    "random": RandomScorer,
    "snapkv": SnapKVScorer,
    "streaming_llm": StreamingLLMScorer,
    "tova": TOVAScorer,
    "value_norm": ValueNormScorer,
}

__all__ = [
    "SCORERS",
    "CURScorer",
    "FunctionScorer",
    "KeyDiffScorer",
    "KnormScorer",
    "LagKVScorer",
    "RandomScorer",
    "Scorer",
    "SnapKVScorer",
    "StreamingLLMScorer",
    "TOVAScorer",
    "ValueNormScorer",
]
