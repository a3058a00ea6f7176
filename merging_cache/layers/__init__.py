"""The layers of a cache: what each holds, when it folds, and what it tells transformers."""

from .again import KnownReadings, SecondReading
from .fixed import FixedCache
from .guards import check_histories
from .hybrid import HybridLayer, MergingHybridLayer, linear_attention_state
from .joint import JointFold
from .learned import Learned
from .merging import MergingLayer
from .padding import Padding
from .seen import TokensSeen
from .shared import Shared

__all__ = [
    "FixedCache",
    "HybridLayer",
    "JointFold",
    "KnownReadings",
    "Learned",
    "MergingHybridLayer",
    "MergingLayer",
    "Padding",
    "SecondReading",
    "Shared",
    "TokensSeen",
    "check_histories",
    "linear_attention_state",
]
