"""The same number of slots for every head."""

from dataclasses import dataclass

from torch import Tensor

from ..states import LayerStates, Survivors
from .base import Budget, top_tokens


@dataclass
class UniformBudget(Budget):
    """Every head keeps its `num_slots` highest scores."""

    def allocate(self, scores: Tensor, states: LayerStates, num_slots: int) -> Survivors:
        return Survivors(top_tokens(scores, num_slots))
