"""Running mean and covariance of the prompt's queries, one pass after another."""

import torch
from torch import Tensor

from ..states import LayerStates


def observe_moments(states: LayerStates, new: int, first_position: int, covariance: bool) -> tuple[Tensor, ...]:
    """The moments of all queries before RoPE so far: those of earlier passes and of the last `new` queries.

    Args:
        states: what `Scorer.observe` is given; its statistics hold what this returned for the last pass.
        new: how many of the queries, the last ones, came with this pass.
        first_position: queries at positions before this are left out.
        covariance: whether to follow it; without it only the count and the mean are returned.

    Returns:
        `(count [B, Hq, 1], mean [B, Hq, D], scatter [B, Hq, D, D])` in fp32, the scatter being the sum of the outer
        products of queries less their mean: passes are joined as in Chan, Golub and LeVeque's parallel algorithm.
    """
    first = states.queries.shape[2] - new
    positions = states.query_positions[:, first:]
    queries = states.queries[:, :, first:].float()
    queries = queries if states.rotary is None else states.rotary.unrotated(queries, positions)
    queries = queries[:, :, positions[0] >= first_position]
    batch, heads, more, dim = queries.shape
    if states.statistics is None:
        count, mean = queries.new_zeros((batch, heads, 1)), queries.new_zeros((batch, heads, dim))
        scatter = queries.new_zeros((batch, heads, dim, dim)) if covariance else None
    else:
        count, mean, *rest = states.statistics.queries
        scatter = rest[0] if rest else None
    if not more:
        return (count, mean) if scatter is None else (count, mean, scatter)
    new_mean = queries.mean(dim=2)
    total = count + more
    step = new_mean - mean
    joined = mean + step * (more / total)
    if scatter is None:
        return total, joined
    centred = queries - new_mean.unsqueeze(2)
    between = step.unsqueeze(-1) * step.unsqueeze(-2) * (count * more / total).unsqueeze(-1)
    return total, joined, scatter + centred.mT @ centred + between


def by_kv_head(tensor: Tensor, num_heads: int) -> Tensor:
    """`[B, Hq, ...]` to `[B, H, G, ...]`."""
    return tensor.unflatten(1, (num_heads, -1))


def unit(states: Tensor) -> Tensor:
    """`[..., D]` at length 1."""
    return torch.nn.functional.normalize(states, dim=-1)
