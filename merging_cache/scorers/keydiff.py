"""Tokens whose keys differ from the average key."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ..states import LayerStates
from .base import Scorer


@dataclass
class KeyDiffScorer(Scorer):
    """`-cos(k, m)` with `m` the mean of the head's normalised keys (KeyDiff, Park et al., arXiv:2504.15364).

    Keeps keys that are far apart, so that every evicted token finds a close survivor among them.
    """

    def score(self, states: LayerStates) -> Tensor:
        keys = states.keys.float()
        mean_direction = normalize(keys, dim=-1).mean(dim=2, keepdim=True)
        return -cosine_similarity(keys, mean_direction, dim=-1)
