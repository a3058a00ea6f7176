"""The layers of a cache: what each holds, when it folds, and what it tells transformers."""

from .again import SecondReading
from .fixed import FixedCache
from .hybrid import HybridLayer, MergingHybridLayer, linear_attention_state
from .joint import JointFold
from .merging import MergingLayer
from .padding import Padding
from .profiled import Profiled
from .seen import TokensSeen
from .shared import Shared

__all__ = [
    "FixedCache",
    "HybridLayer",
    "JointFold",
    "MergingHybridLayer",
    "MergingLayer",
    "Padding",
    "Profiled",
    "SecondReading",
    "Shared",
    "TokensSeen",
    "linear_attention_state",
]
