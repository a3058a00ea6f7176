"""A folding layer beside a linear-attention state, for models whose layers hold both (Falcon-H1, Zamba2 …).

The linear-attention half is transformers' own; only the full-attention half folds.
"""

from typing import Any

from torch import Tensor
from transformers import cache_utils

from .merging import MergingLayer

# older transformers (before 5.5) keep the caches of such models in the models themselves
HybridLayer = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)

LinearAttentionLayer = getattr(cache_utils, "LinearAttentionLayer", None)
MergingHybridLayer = None

if HybridLayer is not None:

    class MergingHybridLayer(MergingLayer, HybridLayer):
        """`LinearAttentionAndFullAttentionLayer` whose attention half is a `MergingLayer`."""

        def __init__(self, *args: Any, number_of_states: int = 1, **kwargs: Any) -> None:
            cache_utils.LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
            MergingLayer.__init__(self, *args, **kwargs)

        def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
            """Two positional arguments come from the attention half, keywords from the other."""
            half = MergingLayer if len(args) == 2 and not kwargs else cache_utils.LinearAttentionLayer
            half.lazy_initialization(self, *args, **kwargs)

        def offload(self) -> None:
            MergingLayer.offload(self)
            cache_utils.LinearAttentionLayer.offload(self)

        def prefetch(self) -> None:
            MergingLayer.prefetch(self)
            cache_utils.LinearAttentionLayer.prefetch(self)

        def reset(self) -> None:
            cache_utils.LinearAttentionLayer.reset(self)
            MergingLayer.reset(self)

        def crop(self, tokens_to_remove: int) -> None:
            self.check_crop(tokens_to_remove)
            cache_utils.LinearAttentionLayer.crop(self, tokens_to_remove)
            MergingLayer.crop(self, tokens_to_remove)

        @property
        def is_croppable(self) -> bool:
            """Whether both halves can be put back."""
            linear = getattr(cache_utils.LinearAttentionLayer, "is_croppable", None)
            return MergingLayer.is_croppable.fget(self) and linear is not None and linear.fget(self)

        def _select_rows(self, indices: Tensor) -> None:
            MergingLayer._select_rows(self, indices)
            cache_utils.LinearAttentionLayer.reorder_cache(self, indices)


def linear_attention_state(layer: Any) -> dict[str, Any]:
    """The attributes of a layer that belong to its linear-attention half; none where it has no such half."""
    if MergingHybridLayer is None or not isinstance(layer, HybridLayer | MergingHybridLayer):
        return {}
    empty = vars(cache_utils.LinearAttentionLayer(number_of_states=layer.number_of_states))
    return {name: vars(layer)[name] for name in empty.keys() - vars(cache_utils.DynamicLayer()).keys()}
