"""Tokens whose keys differ from the average key."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..states import LayerStates
from .base import Scorer


@dataclass
class KeyDiffScorer(Scorer):
    """`-cos(k, m)` with `m` the mean of the head's normalised keys (KeyDiff, Park et al., arXiv:2504.15364).

    Keeps keys that are far apart, so that every evicted token finds a close survivor among them.
    """

    default_budget = "profile"

    def score(self, states: LayerStates) -> Tensor:
        # by products with vectors, head by head, so that nothing as large as the keys is made
        return torch.stack([_score(keys) for keys in states.keys.flatten(0, 1)]).view(states.keys.shape[:3])


def _score(keys: Tensor) -> Tensor:
    """`[L, D]` to `[L]`."""
    keys = keys.float()
    lengths = torch.linalg.vector_norm(keys, dim=-1).clamp_min(1e-8)
    mean_direction = (lengths.reciprocal() / len(keys)) @ keys
    return -(keys @ mean_direction) / (lengths * torch.linalg.vector_norm(mean_direction).clamp_min(1e-8))
