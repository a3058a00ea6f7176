"""Keeps the tokens with large values, which change the output most."""

from dataclasses import dataclass

from torch import Tensor

from ..states import LayerStates
from .base import Scorer


@dataclass
class ValueNormScorer(Scorer):
    """`|v|`: at equal attention, the token with the larger value moves the layer's output further."""

    def score(self, states: LayerStates) -> Tensor:
        return states.values.float().norm(dim=-1)
