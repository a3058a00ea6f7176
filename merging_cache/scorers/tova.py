"""Tokens that the last token attends to."""

from dataclasses import dataclass

from torch import Tensor

from ..states import LayerStates
from .attention import attention_tiles
from .base import Scorer


@dataclass
class TOVAScorer(Scorer):
    """The attention of the last query, averaged over all heads of the layer (TOVA, arXiv:2401.06104).

    All KV heads get the same scores, and the last token scores 1, more than any other.
    """

    needs_queries = True
    query_window = 1

    def score(self, states: LayerStates) -> Tensor:
        ((_, weights),) = attention_tiles(states, last=1)
        scores = weights.mean(dim=(1, 2, 3))
        scores[:, -1] = 1.0
        return scores.unsqueeze(1).expand(states.keys.shape[:3])
