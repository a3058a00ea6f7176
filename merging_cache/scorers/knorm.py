"""Keeps the tokens with short keys, which are the ones attended to."""

from dataclasses import dataclass

from torch import Tensor

from ..states import LayerStates
from .base import Scorer


@dataclass
class KnormScorer(Scorer):
    """`-|k|`: tokens whose keys have a small L2 norm draw most attention (Devoto et al., arXiv:2406.11430)."""

    def score(self, states: LayerStates) -> Tensor:
        return -states.keys.float().norm(dim=-1)
