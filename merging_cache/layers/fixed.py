"""A folded cache with room for a known number of tokens and no more: what `torch.compile` and CUDA graphs can run.

Every tensor keeps its size and place while tokens are decoded. Knows `MergingLayer` and transformers' static layers.
"""

from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from ..storage import FixedStorage
from .merging import MergingLayer
from .seen import TokensSeen
from .stored import Shape


class FixedLayer(StaticLayer):
    """The slots and the tail of a folded layer, followed by room for `max_new_tokens` more."""

    is_croppable = False

    def __init__(self, layer: MergingLayer, max_new_tokens: int) -> None:
        self.storage = FixedStorage(layer.storage, max_new_tokens)
        super().__init__(max_cache_len=self.storage.length)
        self.folded_away = layer.seen - layer.num_stored
        self._guards, self._shape = layer.guards, layer.shape
        # what a static layer has once it is initialized
        self.keys, self.values = self.storage.read()
        self.dtype, self.device, self.cumulative_length = layer.dtype, layer.device, self.storage.count
        self.batch_size, self.num_heads, self.k_head_dim, self.v_head_dim = layer.shape
        self.max_batch_size = self.batch_size
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the keys and values `[B, H, q, D]` of a pass; returns all of them with the room that is left.

        Raises:
            ValueError: for another batch or other heads than what is stored. What is compiled does not look.
        """
        if not torch.compiler.is_compiling() and Shape.of(key_states, value_states) != self._shape:
            self._guards.check_pass(key_states, value_states, self._shape, int(self.get_seq_length()))
        self.storage.append(key_states, value_states)
        return self.storage.read()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row `beam_idx[i]` row i."""
        self.storage.select_rows(beam_idx)

    def get_seq_length(self) -> torch.Tensor:
        """Tokens seen, those included that were folded before."""
        return self.cumulative_length + self.folded_away

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys in every pass, those to come included, and how many columns of the mask to skip.

        Raises:
            ValueError: where there is no room for so many tokens. What is compiled does not look.
        """
        if not torch.compiler.is_compiling():
            room = self.max_cache_len - int(self.cumulative_length)
            if query_length > room:
                raise ValueError(
                    f"this fixed cache has room for {room} more tokens, but {query_length} are to come; make another "
                    "with a larger max_new_tokens"
                )
        return self.max_cache_len, self.folded_away


class FixedCache(Cache):
    """What a merging cache holds, for decoding at most so many tokens; made by `MergingDynamicCache.fixed`.

    On a GPU `generate` compiles the model for it, as for a `StaticCache`. It folds no more, and is independent of the
    cache that it was made from: several can go on from one prompt.
    """

    is_croppable = False

    def __init__(self, layers: list[Any], max_new_tokens: int) -> None:
        for layer in layers:
            finish(layer)
        with torch.inference_mode(False), torch.no_grad():  # so that it can be written to in any mode
            super().__init__(layers=[fixed(layer, max_new_tokens) for layer in layers])

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        """Tokens seen, folded ones included; a tensor in what is compiled."""
        seen = super().get_seq_length(layer_idx)
        return seen if torch.compiler.is_compiling() else TokensSeen(seen)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: nothing here is taken back, and rows stay as they are."""
        raise ValueError(
            "a fixed cache goes on with one prompt: it cannot be reset or cropped (as assisted decoding does), nor its "
            "rows repeated or selected. Do that to the MergingDynamicCache, and make another with .fixed(...)"
        )

    reset = crop = activate_past_recording = batch_repeat_interleave = batch_select_indices = _refuse


def finish(layer: Any) -> None:
    """Do the fold that is due, and check that the layer can be fixed.

    Raises:
        ValueError: for an empty layer, one whose slots need the linked attention, or another kind of layer.
    """
    if type(layer) is MergingLayer:
        layer.finish()
    elif type(layer) is not DynamicSlidingWindowLayer:
        raise ValueError(f"cannot fix a {type(layer).__name__}; only full attention and sliding windows can be")


def fixed(layer: MergingLayer | DynamicSlidingWindowLayer, max_new_tokens: int) -> StaticLayer:
    """One layer with room for `max_new_tokens`."""
    if isinstance(layer, MergingLayer):
        return FixedLayer(layer, max_new_tokens)
    seen, window = layer.cumulative_length, layer.sliding_window
    static = StaticSlidingWindowLayer(max_cache_len=seen + max_new_tokens, sliding_window=window)
    static.lazy_initialization(layer.keys, layer.values)
    held = layer.keys.shape[2]
    # a full window moves on before it takes a token in: what is first is on its way out
    first = static.max_cache_len - held if seen >= static.max_cache_len else 0
    for room, states in ((static.keys, layer.keys), (static.values, layer.values)):
        room[:, :, first : first + held] = states
    static.cumulative_length.fill_(first + held)
    static.cumulative_length_int = seen
    return static
