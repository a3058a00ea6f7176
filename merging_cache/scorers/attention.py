"""The attention of observed queries to a layer's tokens, computed a tile of queries at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..states import TILE, LayerStates, group_logits


def attention_tiles(states: LayerStates, last: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Softmax weights of the last `last` queries (all by default) over the stored tokens each can see.

    Caps on the logits and learned sinks, which a few models have, are left out.

    Yields `(positions, weights)`: `[B, m]`, those of m queries, and `[B, H, G, m, L]` in fp32, zero for tokens that are
    later than the query (for all of them, where it came before what is stored).
    """
    batch, heads, length = states.keys.shape[:3]
    queries, query_positions = states.queries, states.query_positions
    if last is not None:
        first = queries.shape[2] - last
        queries, query_positions = queries[:, :, first:], query_positions[:, first:]
    queries = queries.unflatten(1, (heads, states.group_size)).float() * states.logit_scale
    keys = states.keys.float()
    step = max(1, TILE // (batch * queries.shape[1] * queries.shape[2] * length))
    for start in range(0, queries.shape[3], step):
        positions = query_positions[:, start : start + step]
        logits = group_logits(queries[:, :, :, start : start + step], keys)
        if states.log_mass is not None:
            logits += states.log_mass[:, :, None, None]
        later = states.positions[:, :, None, None] > positions[:, None, None, :, None]
        yield positions, logits.masked_fill_(later, -torch.inf).softmax(dim=-1).masked_fill_(later, 0.0)
