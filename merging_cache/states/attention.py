"""What the queries of tokens that are read again attend to, a tile of queries at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .layer import TILE, LayerStates


def group_logits(queries: Tensor, keys: Tensor) -> Tensor:
    """`[B, H, G, m, L]`, queries `[B, H, G, m, D]` times the keys `[B, H, L, D]` of their KV heads.

    One product for each KV head: a broadcast one would copy its keys for every query head of the group.
    """
    return (queries.flatten(2, 3) @ keys.mT).unflatten(2, queries.shape[2:4])


def drawn_again(states: LayerStates) -> Tensor:
    """`[B, H, L]`, the largest weight of any query that is read again, or what was remembered where that is larger."""
    best = torch.zeros(states.keys.shape[:3], device=states.keys.device)
    if states.statistics is not None and states.statistics.tokens is not None:
        best = states.statistics.tokens
    for logs in again_tiles(states):
        best = torch.maximum(best, logs.amax(dim=(2, 3)).exp())
    return best


def again_tiles(states: LayerStates) -> Iterator[Tensor]:
    """`[B, H, G, m, L]` in fp32, the logarithms of the softmax weights over the L stored tokens of m queries at a time.

    They are the queries of tokens that are read again, which see all that is stored and, of themselves, those before
    them and their own; over the lengths of the attention's input where these are known. Caps on the logits and learned
    sinks, which a few models have, are left out.
    """
    batch, heads, length = states.keys.shape[:3]
    queries = states.queries.unflatten(1, (heads, -1)).float() * states.logit_scale
    stored, own = states.keys.float(), states.again.keys.float()
    index = torch.arange(own.shape[2], device=own.device)
    step = max(1, TILE // (batch * queries.shape[1] * queries.shape[2] * (length + own.shape[2])))
    for start in range(0, queries.shape[3], step):
        asking = queries[:, :, :, start : start + step]
        over_stored, over_own = group_logits(asking, stored), group_logits(asking, own)
        if states.log_mass is not None:
            over_stored += states.log_mass[:, :, None, None]
        later = index > index[start : start + step, None]
        over_own = over_own.masked_fill_(later, -torch.inf).logsumexp(dim=-1)
        total = torch.logaddexp(over_stored.logsumexp(dim=-1), over_own)
        if states.again.norms is not None:
            total += states.again.norms[:, None, None, start : start + step].log()
        yield over_stored.sub_(total.unsqueeze(-1))
