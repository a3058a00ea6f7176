"""A folded cache with room for a known number of tokens and no more: what `torch.compile` and CUDA graphs can run.

Every tensor keeps its size and place while tokens are decoded, and nothing is counted in Python. Knows the layers of
`layer.py` and transformers' static ones.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from .layer import MergingLayer


class FixedLayer(StaticLayer):
    """The slots and the tail of a folded layer, followed by room for `max_new_tokens` more."""

    def __init__(self, layer: MergingLayer, max_new_tokens: int) -> None:
        super().__init__(max_cache_len=layer.num_stored + max_new_tokens)
        self.folded_away = layer.seen - layer.num_stored
        fill(self, layer.keys, layer.values)

    def get_seq_length(self) -> torch.Tensor:
        """Tokens seen, those included that were folded before."""
        return self.cumulative_length + self.folded_away

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys in every pass, those to come included, and how many columns of the mask to skip."""
        return self.max_cache_len, self.folded_away

    def reset(self) -> None:
        """Not possible: what was folded away would be counted on."""
        raise ValueError("a fixed cache goes on with one prompt; make another with MergingDynamicCache(...).fixed(...)")


class FixedCache(Cache):
    """What a merging cache holds, for decoding at most so many tokens; made by `MergingDynamicCache.fixed`.

    On a GPU `generate` compiles the model for it, as for a `StaticCache`. It folds no more, and is independent of the
    cache that it was made from: several can go on from one prompt.
    """

    def __init__(self, layers: list[Any], max_new_tokens: int) -> None:
        super().__init__(layers=[fixed(layer, max_new_tokens) for layer in layers])


def fixed(layer: Any, max_new_tokens: int) -> StaticLayer:
    """One layer with room for `max_new_tokens`.

    Raises:
        ValueError: for an empty layer, one whose slots need the linked attention, or another kind of layer.
    """
    if isinstance(layer, MergingLayer):
        layer.finish()
        return FixedLayer(layer, max_new_tokens)
    if type(layer) is not DynamicSlidingWindowLayer:
        raise ValueError(f"cannot fix a {type(layer).__name__}; only full attention and sliding windows can be")
    seen, window = layer.cumulative_length, layer.sliding_window
    static = StaticSlidingWindowLayer(max_cache_len=seen + max_new_tokens, sliding_window=window)
    room = static.max_cache_len - layer.keys.shape[2]
    # a full window moves on before it takes a token in: what is first is on its way out
    before = (0, 0, room, 0) if seen >= static.max_cache_len else (0, 0, 0, 0)
    fill(static, *(torch.nn.functional.pad(states, before) for states in (layer.keys, layer.values)))
    static.cumulative_length_int = seen
    return static


def fill(static: StaticLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Put keys and values `[B, H, S, D]` first into an empty layer."""
    static.lazy_initialization(keys, values)
    static.keys[:, :, : keys.shape[2]] = keys
    static.values[:, :, : values.shape[2]] = values
    static.cumulative_length.fill_(keys.shape[2])
