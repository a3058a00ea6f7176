"""Tokens that the queries to come are expected to attend to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import option
from ..states import LayerStates, Statistics
from .base import Scorer
from .moments import by_kv_head, observe_moments


@dataclass
class ExpectedAttentionScorer(Scorer):
    """The attention of normally distributed queries at the next positions (Expected Attention, arXiv:2510.00636).

    The prompt's queries before RoPE (without the first `n_sink`) have the mean m and the covariance C. With R the
    rotation averaged over the next `n_future_positions`, `mu = R m` and `S = R C R'`, a token with key k is expected to
    draw `exp(s mu.k + s^2 k'Sk / 2)`, s being the factor on the logits (1 / sqrt(D)). That is normalised over the
    tokens, averaged over the group's query heads, and `(score + epsilon) |v|` is returned. The first `n_sink` tokens
    score highest.

    Args:
        n_future_positions: over how many of the next positions the rotation is averaged.
        n_sink: first tokens that are kept and not counted.
        use_covariance: without it S is 0.
        use_vnorm: without it the score is not multiplied by `|v|`.
        epsilon: added before it is.
    """

    needs_queries = True
    needs_rotary = True
    query_window = 0

    n_future_positions: int = option(512, minimum=1)
    n_sink: int = option(4, minimum=0)
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = option(0.0, minimum=0)

    def observe(self, states: LayerStates, new: int) -> Statistics:
        return Statistics(queries=observe_moments(states, new, self.n_sink, self.use_covariance))

    def score(self, states: LayerStates) -> Tensor:
        count, mean, *scatter = states.statistics.queries
        heads, keys, scale = states.keys.shape[1], states.keys.float(), states.logit_scale

        def rotated(vectors: Tensor) -> Tensor:
            return states.rotary.mean_rotated(vectors, states.seen, self.n_future_positions)

        logits = by_kv_head(rotated(mean), heads) @ keys.mT * scale  # [B, H, G, L]
        if scatter:
            covariance = scatter[0] / count.clamp_min(1).unsqueeze(-1)
            covariance = by_kv_head(rotated(rotated(covariance).mT), heads)
            for member in range(covariance.shape[2]):
                logits[:, :, member] += ((keys @ covariance[:, :, member]) * keys).sum(dim=-1) * (scale**2 / 2)
        if states.log_mass is not None:
            logits += states.log_mass.unsqueeze(2)
        sinks = states.positions < self.n_sink
        least = torch.finfo(logits.dtype).min
        scores = logits.masked_fill_(sinks.unsqueeze(2), least).softmax(dim=-1).mean(dim=2)
        if self.use_vnorm:
            scores = (scores + self.epsilon) * states.values.float().norm(dim=-1)
        return scores.masked_fill(sinks, torch.inf)
