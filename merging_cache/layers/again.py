"""SecondReading: has a model read a prompt once more behind its full cache, for scorers that watch what it looks at.

Knows how transformers' models are called, and of layers what they store.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..model import Pass, cache_argument, most_positions
from .folding import FoldingLayer
from .hybrid import HybridLayer, LinearAttentionLayer, linear_attention_state
from .padding import Padding
from .profiled import WITHIN, spread

SHOWN_FROM = 4096  # tokens from which it takes long enough for a progress bar


class AgainLayer(DynamicLayer):
    """A layer for one pass that reads again: it sees all that another stores, and adds nothing to it.

    Args:
        layer: the other, which is told what the pass attends to.
        there: `[B, q]` bool, where a row has a token that is read again; `None` where all do.
        hidden: how many of the last tokens it does not see.
    """

    def __init__(self, layer: FoldingLayer, there: Tensor | None, hidden: int = 0) -> None:
        super().__init__()
        self._layer, self._there, self._hidden = layer, there, hidden

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What it sees of the other, and the keys and values `[B, H, q, D]` of the pass."""
        stored, seen = self._layer.storage.read(), self._layer.num_stored - self._hidden
        given = zip(stored, (key_states, value_states), strict=True)
        keys, values = (torch.cat([old[:, :, :seen], new], dim=2) for old, new in given)
        self._shown = seen, keys, *stored
        slots = self._layer.fitted_slots()
        Pass(self, self._layer.layer_idx, keys.shape[2], *slots, shows_weights=True).announce(keys)
        return keys, values

    def watch(self, key: Tensor, hidden_states: Tensor | None) -> Callable[[Tensor, slice], None]:
        """What the attention of the pass is to be shown to, see `FoldingLayer.watch_again`."""
        return self._layer.watch_again(key, *self._shown, self._there, hidden_states)

    def get_seq_length(self) -> int:
        return self._layer.seen - self._hidden

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = self._layer.num_stored
        return stored - self._hidden + query_length, self._layer.seen - stored


if HybridLayer is not None:

    class AgainHybridLayer(AgainLayer, HybridLayer):
        """The same beside a linear-attention state, of which it has a copy."""

        def __init__(self, layer: FoldingLayer, there: Tensor | None, hidden: int = 0) -> None:
            LinearAttentionLayer.__init__(self, number_of_states=layer.number_of_states)
            AgainLayer.__init__(self, layer, there, hidden)
            vars(self).update(copy.deepcopy(linear_attention_state(layer)))


def again(layer: CacheLayerMixin, there: Tensor | None, hidden: int) -> CacheLayerMixin:
    """What stands for a layer of the cache in a pass that reads again: it sees the same, and changes nothing there."""
    if not isinstance(layer, FoldingLayer):
        return copy.deepcopy(layer)
    return (AgainHybridLayer if linear_attention_state(layer) else AgainLayer)(layer, there, hidden)


class SecondReading:
    """What was read since the last fold, to be read again before the next.

    A row of a batch that is too short to be folded with the others is read again when it is folded, as if it were
    alone.

    Args:
        chunk_size: tokens that are read at a time.
        part: how many tokens from the beginning are read again, which then see no more than that; `None` for all.
    """

    def __init__(self, chunk_size: int, part: int | None = None) -> None:
        self.chunk_size, self.part = chunk_size, part
        self.forget()

    def forget(self) -> None:
        """The cache is empty."""
        self._passes: list[tuple[str, Tensor]] = []  # the name of the model's argument, and what came
        self._read: Tensor | None = None  # [B], how many tokens of each row are done with

    def note(self, given: Mapping[str, Any]) -> int:
        """Take down a pass by the arguments of the model; returns how many tokens it had."""
        name = "inputs_embeds" if given.get("inputs_embeds") is not None else "input_ids"
        self._passes.append((name, given[name].detach()))
        return given[name].shape[1]

    def truncate(self, count: int) -> None:
        """Forget the last `count` tokens."""
        while count and self._passes:
            name, last = self._passes.pop()
            if last.shape[1] > count:
                self._passes.append((name, last[:, : last.shape[1] - count]))
            count = max(0, count - last.shape[1])

    def select_rows(self, indices: Tensor) -> None:
        """Make row `indices[i]` of the batch row i."""
        self._passes = [(name, given[indices.to(given.device)]) for name, given in self._passes]
        self._read = None if self._read is None else self._read[indices.to(self._read.device)]

    @torch.no_grad()
    def run(
        self,
        layers: list[CacheLayerMixin],
        padding: Padding,
        decoder: torch.nn.Module,
        is_due: Callable[[int], bool],
    ) -> Callable[[], None]:
        """Read again what came, chunk by chunk; the layers that fold are told what is attended to.

        Args:
            layers: of the cache, which stay as they are.
            padding: of its batch.
            decoder: the part of the model that has layers.
            is_due: whether a row of so many tokens is to be folded.

        Returns:
            what is to be called once all is folded.
        """
        folding = [layer for layer in layers if isinstance(layer, FoldingLayer)]
        embeds = {"inputs_embeds"} & {name for name, _ in self._passes}
        given = torch.cat([embed(decoder, name, part) if embeds else part for name, part in self._passes], dim=1)
        (batch, new), seen, device = given.shape[:2], folding[0].seen, given.device
        padded = padding.of_tokens(torch.arange(seen, device=device).expand(batch, -1))
        real = torch.ones(batch, seen, dtype=torch.bool, device=device) if padded is None else ~padded
        number, counts = real.cumsum(dim=1), real.sum(dim=1)
        read = torch.zeros_like(counts) if self._read is None else self._read
        due = torch.tensor([is_due(count) for count in counts.tolist()], device=device)
        asked = real & (number > read.unsqueeze(1)) & due.unsqueeze(1)
        for layer in folding:
            layer.is_to_look_again(asked)
        visible, hidden = real, 0
        if self.part is not None and all(
            isinstance(one, FoldingLayer) and not linear_attention_state(one) for one in layers
        ):
            visible = real & (number <= read.unsqueeze(1) + WITHIN)
            hidden = min(seen - 1 - int(visible.any(dim=0).nonzero().max()), folding[0].num_tail)
            visible, asked = visible[:, : seen - hidden], asked[:, : seen - hidden]
        most = most_positions(decoder.config)
        total = int(asked.sum(dim=1).max()) if self.part is None else min(int(asked.sum(dim=1).max()), self.part)
        takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters
        with tqdm(total=total, desc="reading again", unit=" tokens", disable=total < SHOWN_FROM) as bar:
            for index, there in chunks(asked[:, seen - new :], self.chunk_size, self.part):  # columns of what came
                first = visible.sum(dim=1, keepdim=True)
                if most is not None:
                    first = first.clamp_max(most - index.shape[1])
                inputs = {"inputs_embeds" if embeds else "input_ids": take(given, index)}
                if not (visible.all() and there.all()):
                    inputs["attention_mask"] = torch.cat([visible, there], dim=1).long()
                if takes_positions:
                    inputs["position_ids"] = first + torch.arange(index.shape[1], device=device)
                there = None if there.all() else there
                cache = Cache(layers=[again(layer, there, hidden) for layer in layers])
                decoder(**inputs, **cache_argument(cache), use_cache=True)
                bar.update(index.shape[1])

        def finish() -> None:
            self._read = torch.where(due, counts, read)
            unread = (real & (number > self._read.unsqueeze(1))).any(dim=0)
            left = seen - int(unread.int().argmax()) if unread.any() else 0
            while sum(given.shape[1] for _, given in self._passes[1:]) >= left and self._passes:
                self._passes.pop(0)

        return finish


def chunks(asked: Tensor, size: int, part: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of each row that are asked for, `[B, n]` bool, or a `part` of them, `size` at a time.

    Yields indices `[B, q]`, and where one is. Each row begins with its own first token, so that it is cut as it would
    be alone.
    """
    order = (~asked).to(torch.uint8).sort(dim=1, stable=True).indices
    counts = asked.sum(dim=1, keepdim=True)
    if part is not None:
        index = spread(counts.squeeze(1), part).clamp_max(order.shape[1] - 1)
        order, counts = order.gather(1, index), counts.clamp_max(part)
    for start in range(0, int(counts.max()), size):
        index = order[:, start : min(start + size, int(counts.max()))]
        yield index, torch.arange(start, start + index.shape[1], device=asked.device) < counts


def take(given: Tensor, index: Tensor) -> Tensor:
    """Of `[B, n, ...]` those at `[B, q]`."""
    return given[torch.arange(len(given), device=given.device).unsqueeze(1), index]


def embed(decoder: torch.nn.Module, name: str, given: Tensor) -> Tensor:
    """As embeddings, which they are unless they are ids."""
    return decoder.get_input_embeddings()(given) if name == "input_ids" else given
