"""The same number of slots for every head."""

from dataclasses import dataclass

from torch import Tensor

from ..states import LayerStates, Survivors, top_tokens
from .base import Budget


@dataclass
class UniformBudget(Budget):
    """Every head keeps its `num_slots` highest scores."""

    def allocate(self, scores: Tensor, states: LayerStates, num_slots: int) -> Survivors:
        indices = top_tokens(scores, min(num_slots, states.num_tokens))
        if states.valid is None:
            return Survivors(indices)
        return Survivors.of_mask(Survivors(indices).mask(states.num_tokens) & states.valid)
