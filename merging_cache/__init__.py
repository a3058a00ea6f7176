"""A KV cache for transformers that folds evicted tokens into the survivors instead of throwing them away."""

from .budgets import BUDGETS, Budget
from .cache import MergingDynamicCache
from .calibration import Calibration, calibrate
from .config import MergingConfig
from .mergers import MERGERS, Merger
from .model import forget, load_model, merging_attention
from .quantized_cache import MergingQuantizedCache
from .reading import Comparison, Reading, compare
from .report import CacheReport, LayerReport, plot_merges
from .scorers import SCORERS, KVPressScorer, Scorer
from .states import LayerStates, Slots, Survivors

__version__ = "0.1.0"

__all__ = [
    "BUDGETS",
    "MERGERS",
    "SCORERS",
    "Budget",
    "CacheReport",
    "Calibration",
    "Comparison",
    "KVPressScorer",
    "LayerReport",
    "LayerStates",
    "Merger",
    "MergingConfig",
    "MergingDynamicCache",
    "MergingQuantizedCache",
    "Reading",
    "Scorer",
    "Slots",
    "Survivors",
    "calibrate",
    "compare",
    "forget",
    "load_model",
    "merging_attention",
    "plot_merges",
]
