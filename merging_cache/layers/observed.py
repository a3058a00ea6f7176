"""What a layer remembers of the attention it took part in, for the stages that look at more than keys and values."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..fold import Fold
from ..model import NoRotaryError, rotary_of
from ..states import LayerStates, Slots, Statistics


class Owner:
    """The attention module of a layer and its rotary embedding, or why that could not be made out.

    Copies of a cache share them, and they do not travel with a pickled one, which only knows what it lost.
    """

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        rotary: Any = None,
        lost_module: bool = False,
        lost_rotary: bool = False,
        no_rotary: str | None = None,
    ) -> None:
        self.module = module
        self.rotary = rotary
        self.no_rotary = no_rotary
        self.lost_module = lost_module
        self.lost_rotary = lost_rotary

    def forgotten(self) -> "Owner":
        """One that only knows what there was."""
        lost_module, lost_rotary = self.module is not None, self.rotary is not None
        return Owner(None, None, self.lost_module or lost_module, self.lost_rotary or lost_rotary, self.no_rotary)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Owner":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        forgotten = self.forgotten()
        return Owner, (None, None, forgotten.lost_module, forgotten.lost_rotary, self.no_rotary)


@dataclass
class Observed:
    """Queries and statistics of the prompt so far; tokens that were generated leave none.

    Args:
        owner, scaling: the attention module (with its rotary embedding) and its factor on the logits.
        queries: `[B, Hq, n, D]`, those of the passes that are not digested, after the query window before them.
        positions: `[B, n]`, their positions in the (padded) sequence.
        new: how many of the queries came with passes that are not digested.
        hidden_states: `[B, new, hidden]`, the input of these passes' attention.
        remembered: what each stage remembers, by the stage's name.
        until: the number of tokens seen when the last pass was digested.
    """

    owner: Owner = field(default_factory=Owner)
    scaling: float | None = None
    queries: Tensor | None = None
    positions: Tensor | None = None
    new: int = 0
    hidden_states: Tensor | None = None
    remembered: dict[str, Statistics] = field(default_factory=dict)
    until: int = 0

    def meet(self, module: torch.nn.Module, scaling: float | None, fold: Fold, query: Tensor) -> None:
        """Note which attention module this is, which was given this query."""
        if module is not self.owner.module:
            self.owner = owner_for(fold, module, query)
        self.scaling = scaling

    def receive(self, queries: Tensor, first: int, hidden_states: Tensor | None) -> None:
        """Take the queries `[B, Hq, q, D]` of a pass whose first token is at position `first`."""
        self.new += queries.shape[2]
        positions = torch.arange(first, first + queries.shape[2], device=queries.device).expand(len(queries), -1)
        if self.queries is not None:
            queries = torch.cat([self.queries, queries], dim=2)
            positions = torch.cat([self.positions, positions], dim=1)
        if self.hidden_states is not None:
            hidden_states = torch.cat([self.hidden_states, hidden_states], dim=1)
        self.queries, self.positions, self.hidden_states = queries, positions, hidden_states

    def digest(self, fold: Fold, states: LayerStates) -> None:
        """Let the stages observe what was received since, then keep no more queries than the window."""
        if self.new:
            self.remembered = fold.observe(states, self.new)
            self.until = int(self.positions[:, -self.new :].max()) + 1
        self.new, self.hidden_states = 0, None
        if self.queries is not None and self.queries.shape[2] > fold.query_window:
            # the last ones of each row that are not padding, in their order
            real = (states.query_positions >= 0).to(torch.uint8)
            last = real.sort(dim=1, stable=True).indices[:, real.shape[1] - fold.query_window :]
            self.positions = self.positions.gather(1, last)
            index = last[:, None, :, None].expand(-1, self.queries.shape[1], -1, self.queries.shape[3])
            self.queries = self.queries.gather(2, index)

    def truncate(self, seen: int, stored: int) -> None:
        """Forget tokens at positions from `seen` on, of which `stored` are left."""
        if self.queries is not None:
            gone = int((self.positions[0] >= seen).sum())  # these came last, in all rows
            keep = self.queries.shape[2] - gone
            self.queries, self.positions = self.queries[:, :, :keep], self.positions[:, :keep]
            self.new = max(0, self.new - gone)
            if self.hidden_states is not None:
                self.hidden_states = self.hidden_states[:, : self.new]
        self.remembered = {name: statistics.resized(stored) for name, statistics in self.remembered.items()}

    def select_rows(self, indices: Tensor) -> None:
        """Make row `indices[i]` of the batch row i."""
        if self.queries is not None:
            self.queries = self.queries.index_select(0, indices.to(self.queries.device))
            self.positions = self.positions.index_select(0, indices.to(self.positions.device))
        if self.hidden_states is not None:
            self.hidden_states = self.hidden_states.index_select(0, indices.to(self.hidden_states.device))
        self.remembered = {
            name: statistics.select(indices.to(statistics.device)) for name, statistics in self.remembered.items()
        }

    @property
    def statistics(self) -> Statistics | None:
        """What the scorer remembers."""
        return self.remembered.get("scorer")

    def settle(self, fold: Fold, slots: Slots) -> None:
        """After a fold: what the scorer keeps per token lies with the slots, and stages may forget what they can."""
        if self.statistics is not None:
            self.remembered = self.remembered | {"scorer": replace(self.statistics, tokens=None)}
        folded = ((slots.num_merged + slots.num_dropped) > 0).any(dim=1)
        settled = {name: fold.stages[name].settle(one, folded) for name, one in self.remembered.items()}
        self.remembered = {name: one for name, one in settled.items() if one is not None and one.is_something}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.queries, self.positions, self.hidden_states, *self.remembered.values())
        return sum(part.nbytes for part in held if part is not None)


def owner_for(fold: Fold, module: torch.nn.Module, query: Tensor) -> Owner:
    """The module with its rotary embedding, if a stage asks for it.

    Raises:
        NoRotaryError: if it cannot be made out, and a stage cannot do without.
    """
    stages = fold.stages.values()
    if not any(stage.needs_rotary or stage.uses_rotary for stage in stages):
        return Owner(module)
    try:
        return Owner(module, rotary_of(module, query))
    except NoRotaryError as refusal:
        if any(stage.needs_rotary for stage in stages):
            raise
        return Owner(module, no_rotary=refusal.reason)


def by_stored_head(query: Tensor, key: Tensor, stored: Tensor) -> Tensor | None:
    """The query heads in the order of the KV heads in `stored` that they read.

    They come that way, unless the model repeats the stored keys in an order of its own to make the `key` that it
    attends to. `None` where it computes other keys from them.
    """
    if key.shape == stored.shape:
        return query
    if key.shape[1] % stored.shape[1] == 0 and key.shape[2:] == stored.shape[2:]:
        # the keys of the last token tell which is which
        same = (key[0, :, None, -1] == stored[0, None, :, -1]).all(dim=-1)  # [attended heads, stored heads]
        if bool((same.sum(dim=1) == 1).all()):
            order = same.int().argmax(dim=1).repeat_interleave(query.shape[1] // key.shape[1])
            return query[:, order.argsort(stable=True)]
    return None
