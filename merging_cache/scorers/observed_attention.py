"""Tokens that the prompt attended to."""

from dataclasses import dataclass

from torch import Tensor

from ..states import LayerStates, Statistics
from .attention import attention_tiles
from .base import Scorer, remembered


@dataclass
class ObservedAttentionScorer(Scorer):
    """The attention a token received, averaged over the queries that could see it (H2O, arXiv:2306.14048).

    Sum over the prompt's queries of the causal softmax, divided by the number of queries at or after the token, mean
    over the query heads of the group. Summed up pass by pass in tiles, so that no attention matrix is ever held and any
    attention implementation will do. A token that nothing has attended to yet scores 0.
    """

    needs_queries = True
    query_window = 0

    def observe(self, states: LayerStates, new: int) -> Statistics:
        received = remembered(states, 2)  # attention, queries
        for positions, weights in attention_tiles(states, last=new):
            received[..., 0] += weights.mean(dim=2).sum(dim=2)
            received[..., 1] += (states.positions.unsqueeze(3) <= positions[:, None, None]).sum(dim=3)
        return Statistics(tokens=received)

    def score(self, states: LayerStates) -> Tensor:
        attention, queries = states.statistics.tokens.unbind(dim=-1)
        return attention / queries.clamp_min(1)
