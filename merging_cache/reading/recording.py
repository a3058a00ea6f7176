"""A cache that folds nothing and writes down all that its layers are told: what a reading is made of."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..cache import MergingDynamicCache
from ..layers import HybridLayer, MergingHybridLayer, MergingLayer, linear_attention_state
from ..model import Pass, find_pass


@dataclass
class Attended:
    """What the attention of a layer was given, as `MergingLayer.attended` is told it, over one pass or several.

    Args:
        queries: of every pass, `[B, Hq, q, D]`.
        hidden_states: of every pass, `[B, q, hidden]`; empty where they are not kept.
        given: key and value of the last pass, where the model computes others than those that `update` returned.
        rest: what else it was told of the last pass.
    """

    queries: list[Tensor]
    hidden_states: list[Tensor]
    given: tuple[Tensor, Tensor] | None
    rest: dict[str, Any]

    def replay(self, keys: Tensor, values: Tensor) -> None:
        """Tell the layer whose `update` returned `keys` and `values`, if it waits for that."""
        announced = find_pass(self.rest["module"], keys)
        if announced is not None:
            key, value = self.given or (keys, values)
            announced.tell(
                query=joined(self.queries, dim=2),
                key=key,
                value=value,
                hidden_states=joined(self.hidden_states, dim=1) if self.hidden_states else None,
                **self.rest,
            )

    @property
    def nbytes(self) -> int:
        """Bytes held, besides what the cache itself would hold."""
        return sum(part.nbytes for part in (*self.queries, *self.hidden_states, *(self.given or ())))


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """One tensor; of one pass the very tensor that there was: another layout may mean other last bits."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


class _Recording:
    """What makes a merging layer one that records."""

    attended_with: Attended | None = None
    keeps_hidden_states = True
    progress_bar: Any = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.append(key_states, value_states)
        self._returned = self.storage.read()
        Pass(self, self.layer_idx, self.num_stored).announce(self._returned[0])
        if self.progress_bar is not None:
            self.progress_bar.update(key_states.shape[2])
        return self._returned

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, hidden_states: Tensor | None = None, **rest: Any
    ) -> None:
        before = self.attended_with or Attended([], [], None, {})
        kept = [] if hidden_states is None or not self.keeps_hidden_states else [hidden_states]
        given = None if key is self._returned[0] and value is self._returned[1] else (key, value)
        self.attended_with = Attended([*before.queries, query], [*before.hidden_states, *kept], given, rest)
        self._returned = None


class RecordingLayer(_Recording, MergingLayer):
    """A full-attention layer that records."""


RecordingHybridLayer = None

if MergingHybridLayer is not None:

    class RecordingHybridLayer(_Recording, MergingHybridLayer):
        """The same beside a linear-attention state."""


class RecordingCache(MergingDynamicCache):
    """A cache that records one context, for `fill_from`.

    Args:
        model: which is linked, if it can be, until `release`.
        hidden_states: whether to keep the attention's inputs.
    """

    def __init__(self, model: PreTrainedModel, hidden_states: bool = True) -> None:
        self.keeps_hidden_states = hidden_states
        super().__init__(model=model, compression_ratio=0)
        self._num_layers = len(self.layers)  # a model may add copies
        if hidden_states:
            self._shared.link.watch_hidden_states()

    def _folding(self, layer: CacheLayerMixin, index: int, rank: tuple[int, int]) -> MergingLayer:
        if type(layer) is HybridLayer:
            made = RecordingHybridLayer(self._shared, index, rank, number_of_states=layer.number_of_states)
        else:
            made = RecordingLayer(self._shared, index, rank)
        made.keeps_hidden_states = self.keeps_hidden_states
        return made

    @contextmanager
    def progress_bar(self, num_tokens: int, shows: bool) -> Iterator[None]:
        """Show how many of the tokens have been through how many of the layers."""
        layers = self.folding_layers
        scale = 1 / max(1, len(layers))
        with tqdm(
            total=num_tokens * len(layers), desc="reading", unit=" tokens", unit_scale=scale, disable=not shows
        ) as bar:
            for layer in layers:
                layer.progress_bar = bar
            yield
        for layer in self.folding_layers:
            layer.progress_bar = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        attended = (layer.attended_with for layer in self.folding_layers)
        return self.report().total.bytes_now + sum(one.nbytes for one in attended if one is not None)

    def fill(self, cache: Cache) -> None:
        """Give an empty cache what a pass over the same context would have given it."""
        grows = getattr(cache, "layer_class_to_replicate", None) is not None
        if not grows and len(cache.layers) != self._num_layers:
            raise ValueError(
                f"the cache has {len(cache.layers)} layers, and the model that has read {self._num_layers}"
            )
        for layer in [] if grows else self.layers[len(cache.layers) :]:  # copies that a model made, as it makes them
            cache.layers.append(copy.deepcopy(cache.layers[layer.layer_idx] if is_recording(layer) else layer))
        for index, layer in enumerate(self.layers):
            if is_recording(layer):
                keys, values = cache.update(layer.keys.clone(), layer.values.clone(), index)
                if layer.attended_with is not None:
                    layer.attended_with.replay(keys, values)
                state = linear_attention_state(layer)
            else:
                state = vars(layer)
                if type(layer) is not type(cache.layers[index]):
                    raise TypeError(
                        f"layer {index} of this {type(cache).__name__} is {type(cache.layers[index]).__name__}, and "
                        f"the model's is {type(layer).__name__}; make the cache with config=model.config"
                    )
            vars(cache.layers[index]).update(copy.deepcopy(state))


def is_recording(layer: CacheLayerMixin) -> bool:
    """Whether a layer records."""
    return isinstance(layer, _Recording)
