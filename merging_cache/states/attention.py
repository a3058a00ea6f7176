"""Products of queries and keys, and what tokens draw of the attention of those that are read again."""

import torch
from torch import Tensor

from .layer import LayerStates


def group_logits(queries: Tensor, keys: Tensor) -> Tensor:
    """`[B, H, G, m, L]`, queries `[B, H, G, m, D]` times the keys `[B, H, L, D]` of their KV heads.

    One product for each KV head: a broadcast one would copy its keys for every query head of the group.
    """
    return (queries.flatten(2, 3) @ keys.mT).unflatten(2, queries.shape[2:4])


def drawn_again(states: LayerStates) -> Tensor:
    """`[B, H, L]`, the largest weight of any token that is read again, or what was remembered where that is larger."""
    drawn = states.again.weights.flatten(2, 3).amax(dim=2).float()
    return drawn if states.statistics is None else torch.maximum(drawn, states.statistics.tokens)
