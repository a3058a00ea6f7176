"""Budgets: how the slots are shared, and so which tokens survive. `BUDGETS` is the table of their names."""

from .adakv import AdaKVBudget
from .auto import AutoBudget
from .base import Budget
from .layers import PerLayerBudget, PyramidBudget
from .over_layers import GlobalBudget
from .profile import ProfileBudget
from .threshold import ThresholdBudget
from .uniform import UniformBudget

BUDGETS: dict[str, type[Budget]] = {
    "adakv": AdaKVBudget,
    "auto": AutoBudget,
    "global": GlobalBudget,
    "per_layer": PerLayerBudget,
    "profile": ProfileBudget,
    "pyramid": PyramidBudget,
    "threshold": ThresholdBudget,
    "uniform": UniformBudget,
}

__all__ = [
    "BUDGETS",
    "AdaKVBudget",
    "AutoBudget",
    "Budget",
    "GlobalBudget",
    "PerLayerBudget",
    "ProfileBudget",
    "PyramidBudget",
    "ThresholdBudget",
    "UniformBudget",
]
