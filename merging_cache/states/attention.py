"""Products of queries and keys."""

from torch import Tensor


def group_logits(queries: Tensor, keys: Tensor) -> Tensor:
    """`[B, H, G, m, L]`, queries `[B, H, G, m, D]` times the keys `[B, H, L, D]` of their KV heads.

    One product for each KV head: a broadcast one would copy its keys for every query head of the group.
    """
    return (queries.flatten(2, 3) @ keys.mT).unflatten(2, queries.shape[2:4])
