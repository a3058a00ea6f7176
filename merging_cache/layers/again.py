"""SecondReading: has a model read a prompt once more behind its full cache, for scorers that watch what it looks at.

Knows how transformers' models are called, and of layers what they store.
"""

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from ..learner import LEAD
from ..model import Pass, cache_argument, most_positions
from ..stage import Stage
from ..states import Statistics
from ..twin import OF_ROWS, OWN, WIRING, twin_of
from .folding import FoldingLayer
from .hybrid import HybridLayer, LinearAttentionLayer, linear_attention_state
from .padding import Padding

SINKS, WINDOW = 4, 1024  # what a part of a prompt sees when it is read again: these first tokens, and those around it
SHOWN_FROM = 4096  # tokens from which it takes long enough for a progress bar


class AgainLayer(DynamicLayer):
    """A layer for one pass that reads again: it sees all that another stores, and adds nothing to it.

    Args:
        layer: the other, which is told what the pass attends to.
        told: `[B, q]` bool, the tokens of the pass that tell something; `None` for all.
        columns: which of the stored tokens it sees; `None` for all.
    """

    def __init__(self, layer: FoldingLayer, told: Tensor | None, columns: Tensor | None = None) -> None:
        super().__init__()
        self._layer, self._told, self._columns = layer, told, columns

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What it sees of the other, and the keys and values `[B, H, q, D]` of the pass."""
        # layers may lie on several devices, or offloaded
        stored = tuple(one.to(key_states.device) for one in self._layer.storage.read())
        columns = None if self._columns is None else self._columns.to(key_states.device)
        seen = stored if columns is None else (one.index_select(2, columns) for one in stored)
        given = zip(seen, (key_states, value_states), strict=True)
        keys, values = (torch.cat([old, new], dim=2) for old, new in given)
        self._shown = keys, columns, *stored
        slots = self._layer.fitted_slots()
        Pass(self, self._layer.layer_idx, keys.shape[2], *slots, shows_weights=True).announce(keys)
        return keys, values

    def watch(self, key: Tensor, hidden_states: Tensor | None) -> Callable[[Tensor, Tensor, slice], None]:
        """What the attention of the pass is to be shown to, see `FoldingLayer.watch_again`."""
        return self._layer.watch_again(key, *self._shown, self._told, hidden_states)

    def get_seq_length(self) -> int:
        return self._layer.seen if self._columns is None else len(self._columns)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = self._layer.num_stored if self._columns is None else len(self._columns)
        return stored + query_length, self.get_seq_length() - stored


if HybridLayer is not None:

    class AgainHybridLayer(AgainLayer, HybridLayer):
        """The same beside a linear-attention state, of which it has a copy."""

        def __init__(self, layer: FoldingLayer, told: Tensor | None, columns: Tensor | None = None) -> None:
            LinearAttentionLayer.__init__(self, number_of_states=layer.number_of_states)
            AgainLayer.__init__(self, layer, told, columns)
            vars(self).update(copy.deepcopy(linear_attention_state(layer)))


def again(layer: CacheLayerMixin, told: Tensor | None, columns: Tensor | None) -> CacheLayerMixin:
    """What stands for a layer of the cache in a pass that reads again: it sees the same, and changes nothing there."""
    if not isinstance(layer, FoldingLayer):
        return copy.deepcopy(layer)
    return (AgainHybridLayer if linear_attention_state(layer) else AgainLayer)(layer, told, columns)


@dataclass(frozen=True)
class Due:
    """What is to be read again of a batch.

    Args:
        real: `[B, L]` bool, no padding.
        rows: `[B]` bool, those that are to be folded.
        asked: `[B, L]` bool, what is read again.
        told: `[B, L]` bool, what tells something of that.
        passes: what came last, ids `[B, n]` or embeddings `[B, n, hidden]`, in the order of the tokens.
    """

    real: Tensor
    rows: Tensor
    asked: Tensor
    told: Tensor
    passes: list[Tensor]

    @property
    def number(self) -> Tensor:
        """`[B, L]`, how many tokens a row has up to each of its own, this one included."""
        return self.real.cumsum(dim=1)

    @property
    def counts(self) -> Tensor:
        """`[B]`, how many tokens each row has."""
        return self.real.sum(dim=1)

    @cached_property
    def words(self) -> list[tuple[float, ...]]:
        """By row, what the tokens that tell something are: ids, or for embeddings a number hardly ever that of two."""
        parts = [part if part.dim() == 2 else part.float().sum(dim=-1) for part in self.passes]
        given = torch.cat([part.double() for part in parts], dim=1)
        last = self.told[:, self.told.shape[1] - given.shape[1] :]
        return [tuple(mine[there].tolist()) for mine, there in zip(given, last, strict=True)]

    def around(self) -> Tensor:
        """`[B, L]` bool, the first tokens of each row, and those in a window around what is read again."""
        center = (self.number * self.asked).sum(dim=1) // self.asked.sum(dim=1).clamp_min(1)
        near = (self.number - center.unsqueeze(1)).abs() <= WINDOW // 2
        return self.real & ((self.number <= SINKS) | near)


@dataclass
class KnownReadings:
    """What second readings of one context have told, for other caches that have it read the same way.

    Args:
        found: of each the stages that it was for, how it was cut, which rows were due, what each layer remembers of it
            by stage, and the seconds that it took.
        seconds_saved: what all that were known have taken when they were read.
    """

    found: list[tuple[Any, list[dict[str, Statistics]], float]] = field(default_factory=list)
    seconds_saved: float = 0.0

    def give(self, asked: Any, layers: list[FoldingLayer]) -> bool:
        """Have the layers remember what is known of a reading; returns whether it is."""
        for known, of_layers, seconds in self.found:
            if known == asked:
                for layer, drawn in zip(layers, of_layers, strict=True):
                    layer.drawn_again = drawn
                self.seconds_saved += seconds
                return True
        return False

    def take(self, asked: Any, layers: list[FoldingLayer], seconds: float) -> None:
        """Remember what layers were told by a reading."""
        self.found.append((asked, [layer.drawn_again for layer in layers], seconds))


class SecondReading:
    """What was read since the last fold, to be read again before the next.

    A row of a batch that is too short to be folded with the others is read again when it is folded, as if it were
    alone.

    Args:
        stages: for which it is read again, by their names.
        chunk_size: tokens that are read at a time.
        part: how many tokens from the middle are read again, of which the first (`LEAD`, or half) tell nothing: the
            model has to get into the text. They see the first few tokens and a window around themselves, from where
            they stand behind the prompt. `None` reads all, which sees all.
    """

    def __init__(self, stages: Mapping[str, Stage], chunk_size: int, part: int | None = None) -> None:
        self.stages, self.chunk_size, self.part = stages, chunk_size, part
        self.forget()

    def forget(self) -> None:
        """The cache is empty."""
        self._passes: list[tuple[str, Tensor]] = []  # the name of the model's argument, and what came
        self._read: Tensor | None = None  # [B], how many tokens of each row are done with
        self._known: KnownReadings | None = None  # of a context that came whole

    def note(self, given: Mapping[str, Any], known: KnownReadings | None = None) -> int:
        """Take down a pass by the arguments of the model; returns how many tokens it had.

        `known` is what others were told of the same context; what this one finds out is added.
        """
        name = "inputs_embeds" if given.get("inputs_embeds") is not None else "input_ids"
        self._passes.append((name, given[name].detach()))
        self._known = known
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

    def run(
        self,
        layers: list[CacheLayerMixin],
        padding: Padding,
        decoder: torch.nn.Module,
        is_due: Callable[[int], bool],
        recalls: Callable[[list[tuple[float, ...]]], bool],
    ) -> Due:
        """Read again what came; the layers that fold are told what is attended to.

        Args:
            layers: of the cache, which stay as they are.
            padding: of its batch.
            decoder: the part of the model that has layers.
            is_due: whether a row of so many tokens is to be folded.
            recalls: whether it is known what such tokens tell, by row; then nothing is read.

        Returns:
            what was read, for `finish`.
        """
        folding = [layer for layer in layers if isinstance(layer, FoldingLayer)]
        due = self._due(folding[0].seen, padding, is_due)
        for layer in folding:
            layer.is_to_look_again(due.told)
        known = self._known
        if known is not None and any(layer.storage.is_packed for layer in folding):
            known = None  # its keys are not those that others have seen
        asked = self.stages, self.chunk_size, self.part, due.rows.tolist()
        if not recalls(due.words) and (known is None or not known.give(asked, folding)):
            started = time.perf_counter()
            self._read_again(layers, due, decoder)
            if known is not None:
                known.take(asked, folding, time.perf_counter() - started)
        return due

    def _due(self, seen: int, padding: Padding, is_due: Callable[[int], bool]) -> Due:
        given = self._passes[-1][1]
        padded = padding.of_tokens(torch.arange(seen, device=given.device).expand(len(given), -1))
        real = torch.ones(len(given), seen, dtype=torch.bool, device=given.device) if padded is None else ~padded
        rows = torch.tensor([is_due(count) for count in real.sum(dim=1).tolist()], device=given.device)
        asked = self._unread(real) & rows.unsqueeze(1)
        asked, told = (asked, asked) if self.part is None else middle_of(asked, self.part)
        return Due(real, rows, asked, told, [part for _, part in self._passes])

    def _unread(self, real: Tensor) -> Tensor:
        """Which of the tokens `[B, L]` were not read again yet."""
        return real if self._read is None else real & (real.cumsum(dim=1) > self._read.unsqueeze(1))

    @torch.no_grad()
    def _read_again(self, layers: list[CacheLayerMixin], due: Due, decoder: torch.nn.Module) -> None:
        """Chunk by chunk, by a twin of the decoder: in the middle of a user's pass, who is not to notice."""
        decoder = twin_of(decoder, (*WIRING, OWN, OF_ROWS))
        embeds = {"inputs_embeds"} & {name for name, _ in self._passes}
        given = torch.cat([embed(decoder, name, part) if embeds else part for name, part in self._passes], dim=1)
        before = due.real.shape[1] - given.shape[1]
        takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters
        visible, columns = due.real, None
        if self.part is not None and takes_positions and all(keeps_every_token(layer) for layer in layers):
            visible = due.around()
            columns = visible.any(dim=0).nonzero().squeeze(1)
            visible = visible[:, columns]
        most, total = most_positions(decoder.config), int(due.asked.sum(dim=1).max())
        with tqdm(total=total, desc="reading again", unit=" tokens", disable=total < SHOWN_FROM) as bar:
            for index, there in chunks(due.asked, self.chunk_size):
                inputs = {"inputs_embeds" if embeds else "input_ids": take(given, (index - before).clamp_min(0))}
                if not (visible.all() and there.all()):
                    inputs["attention_mask"] = torch.cat([visible, there], dim=1).long()
                if takes_positions:
                    first = due.counts if most is None else due.counts.clamp_max(most - index.shape[1])
                    inputs["position_ids"] = first.unsqueeze(1) + torch.arange(index.shape[1], device=given.device)
                telling = there & take(due.told, index)
                cache = Cache(layers=[again(layer, None if telling.all() else telling, columns) for layer in layers])
                decoder(**inputs, **cache_argument(cache), use_cache=True)
                bar.update(index.shape[1])

    def finish(self, due: Due) -> None:
        """Once all is folded, forget what will not be read again."""
        self._read = torch.where(due.rows, due.counts, 0 if self._read is None else self._read)
        unread, seen = self._unread(due.real).any(dim=0), due.real.shape[1]
        left = seen - int(unread.int().argmax()) if unread.any() else 0
        while sum(given.shape[1] for _, given in self._passes[1:]) >= left and self._passes:
            self._passes.pop(0)


def keeps_every_token(layer: CacheLayerMixin) -> bool:
    """Whether a layer sees all tokens and has folded none."""
    return isinstance(layer, FoldingLayer) and not layer.num_slots and not linear_attention_state(layer)


def middle_of(asked: Tensor, part: int) -> tuple[Tensor, Tensor]:
    """`part` tokens from the middle of those that are asked for in each row, `[B, L]` bool, and those that tell."""
    rank, counts = asked.cumsum(dim=1), asked.sum(dim=1, keepdim=True)
    start, size = (counts - part).clamp_min(0) // 2, counts.clamp_max(part)
    block = asked & (rank > start) & (rank <= start + size)
    return block, block & (rank > start + (size // 2).clamp_max(LEAD))


def chunks(asked: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of each row that are asked for, `[B, L]` bool, `size` at a time: indices `[B, q]`, and where one is.

    Each row begins with its own first token, so that it is cut as it would be alone.
    """
    order = (~asked).to(torch.uint8).sort(dim=1, stable=True).indices
    counts = asked.sum(dim=1, keepdim=True)
    for start in range(0, int(counts.max()), size):
        index = order[:, start : min(start + size, int(counts.max()))]
        yield index, torch.arange(start, start + index.shape[1], device=asked.device) < counts


def take(given: Tensor, index: Tensor) -> Tensor:
    """Of `[B, n, ...]` those at `[B, q]`."""
    return given[torch.arange(len(given), device=given.device).unsqueeze(1), index]


def embed(decoder: torch.nn.Module, name: str, given: Tensor) -> Tensor:
    """As embeddings, which they are unless they are ids."""
    return decoder.get_input_embeddings()(given) if name == "input_ids" else given
