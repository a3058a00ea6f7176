"""Tokens whose values the others cannot stand in for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import solve_positive_definite
from ..stage import option
from ..states import LayerStates, Statistics
from .base import Scorer
from .moments import by_kv_head, observe_moments, unit


@dataclass
class CapScorer(Scorer):
    """Relevance to the mean query times the leverage of the value (CapKV, as in kvpress's `CapPress`).

    With `q` the mean of the queries since the last fold, before RoPE (without the first `n_sink`), turned by the
    rotation averaged over the next `n_future_positions`, or as they are where the model has none that can be made out:
    `w = exp(tau (cos(q, k) - max))`, `A = I + sum (w + epsilon) v v'` over the
    tokens, and a token scores `w v' A^-1 v`, averaged over the query heads of the group. The first `n_sink` tokens
    score highest.

    Args:
        tau: how much relevance counts.
        n_future_positions: over how many of the next positions the rotation is averaged.
        n_sink: first tokens that are kept and not counted.
        epsilon: added to the weights inside A.
    """

    default_budget = "profile"
    needs_queries = True
    uses_rotary = True
    query_window = 0

    tau: float = option(5.0, minimum=0)
    n_future_positions: int = option(512, minimum=1)
    n_sink: int = option(4, minimum=0)
    epsilon: float = option(1e-6, minimum=0)

    def observe(self, states: LayerStates, new: int) -> Statistics:
        return Statistics(queries=observe_moments(states, new, self.n_sink, covariance=False))

    def settle(self, statistics: Statistics, folded: Tensor) -> Statistics | None:
        if bool(folded.all()):
            return None
        left = ~folded.view(-1, 1, 1)
        return Statistics(queries=tuple(one * left for one in statistics.queries))

    def score(self, states: LayerStates) -> Tensor:
        _, mean = states.statistics.queries
        if (rotary := states.rotary) is not None:
            mean = rotary.mean_rotated(mean, states.seen, self.n_future_positions)
        anchor = by_kv_head(unit(mean), states.keys.shape[1])
        sinks = states.positions < self.n_sink
        cosine = anchor @ unit(states.keys.float()).mT  # [B, H, G, L]
        highest = cosine.masked_fill(sinks.unsqueeze(2), -1.0).amax(dim=-1, keepdim=True)
        weights = (self.tau * (cosine - highest)).exp().masked_fill(sinks.unsqueeze(2), 0.0)
        values, members = states.values.float(), weights.unbind(dim=2)
        counted = values.masked_fill(sinks.unsqueeze(-1), 0.0)
        identity = torch.eye(values.shape[3], device=values.device)
        capacity = [counted.mT @ (counted * (one + self.epsilon).unsqueeze(-1)) + identity for one in members]
        capacity = torch.stack(capacity)
        # the inverse once, and not a solution for every token
        inverse = solve_positive_definite(capacity, identity.expand_as(capacity))
        scores = sum(one * (values @ of_one * values).sum(dim=-1) for one, of_one in zip(members, inverse, strict=True))
        return (scores / len(members)).masked_fill(sinks, torch.inf)
