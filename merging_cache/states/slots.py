"""What comes out of a fold: which tokens survive, and the slots to store."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .layer import LayerStates

DROPPED, ABSENT = -1, -2  # in `Slots.holders`: no slot holds the token; the row has no such token


@dataclass(frozen=True)
class Survivors:
    """Which tokens keep their slot: a budget's answer.

    Args:
        indices: `[B, H, K]`, ascending indices into the L stored tokens.
        valid: `[B, H, K]` bool, False where a head has fewer than K slots (its first ones then); `None` where every
            slot is real.
        protected: `[B, H, K]` bool, True for sinks and recent tokens, into which nothing is merged; `None` for none.
        scores: `[B, H, K]`, those by which they were chosen; `None` where that is not told.
    """

    indices: Tensor
    valid: Tensor | None = None
    protected: Tensor | None = None
    scores: Tensor | None = None

    def of_heads(self, heads: slice) -> "Survivors":
        """Those of these KV heads."""
        parts = (self.indices, self.valid, self.protected, self.scores)
        return Survivors(*(None if part is None else part[:, heads] for part in parts))

    @classmethod
    def of_mask(cls, kept: Tensor) -> "Survivors":
        """The survivors of `[B, H, L]` bool, True for tokens that keep their slot."""
        counts = kept.sum(dim=-1, keepdim=True)
        most = int(counts.max())
        # a stable sort puts the evicted first and leaves the order of the others
        indices = kept.to(torch.uint8).sort(dim=-1, stable=True).indices[..., kept.shape[2] - most :]
        valid = torch.arange(most, device=kept.device) >= most - counts
        return cls(indices) if bool(valid.all()) else cls(indices, valid)

    def mask(self, num_tokens: int) -> Tensor:
        """`[B, H, L]` bool, True for tokens that keep their slot."""
        kept = torch.zeros((*self.indices.shape[:2], num_tokens), dtype=torch.bool, device=self.indices.device)
        return kept.scatter_(2, self.indices, True if self.valid is None else self.valid)

    def evicted(self, num_tokens: int) -> Tensor:
        """`[B, H, L - K]`, the ascending indices of the tokens that lose their slot, where all heads lose as many."""
        kept = self.indices.shape[2]
        # a stable sort, and not `nonzero`, whose size a GPU would have to tell first
        return (
            self.mask(num_tokens)
            .to(torch.uint8)
            .sort(dim=-1, stable=True)
            .indices[..., : num_tokens - kept]
            .contiguous()
        )


@dataclass(frozen=True)
class Slots:
    """What a layer stores after a fold.

    Args:
        keys, values: `[B, H, K, D]`, in the model's precision, owning their memory.
        positions: `[B, H, K]`, the position of each slot's survivor.
        num_merged: `[B, H]`, evicted tokens folded into a survivor in this fold, less those that were folded into a
            slot before and are dropped with it now.
        num_dropped: `[B, H]`, evicted tokens that were not folded, and those.
        log_mass: `[B, H, K]`, or `None` where no slot has mass beyond its own token.
        valid: `[B, H, K]` bool, True for the slots that exist where heads have different numbers of them, which are
            the last ones of each head; `None` where all do.
        statistics: `[B, H, K, ...]`, what the scorer keeps for each slot's token, or `None`.
        tokens: `[B, H, K]`, which stored token each slot is named after, where that is not the survivor.
        holders: `[B, H, P]`, where states are traced, for each of the positions 0 to P - 1 of a row that of the slot
            that holds its token now: its own for survivors, else `DROPPED` or `ABSENT`.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    num_merged: Tensor
    num_dropped: Tensor
    log_mass: Tensor | None = None
    valid: Tensor | None = None
    statistics: Tensor | None = None
    tokens: Tensor | None = None
    holders: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence["Slots"]) -> "Slots":
        """The slots of some heads after another, all with as many."""
        if len(parts) == 1:
            return parts[0]
        columns = {one.name: [getattr(part, one.name) for part in parts] for one in fields(cls)}
        held = {name: tensors for name, tensors in columns.items() if any(tensor is not None for tensor in tensors)}
        return cls(**{name: torch.cat(tensors, dim=1) for name, tensors in held.items()})

    @classmethod
    def of_survivors(cls, states: LayerStates, survivors: Survivors) -> "Slots":
        """The survivors as they are, everything else counted as dropped: hard eviction."""
        indices = survivors.indices
        num_merged = torch.zeros(indices.shape[:2], dtype=torch.long, device=indices.device)
        num_dropped = num_merged + (states.num_tokens - indices.shape[2])
        if states.log_mass is not None:
            evicted = survivors.evicted(states.num_tokens)
            num_merged, num_dropped = count_evicted(states, evicted, torch.zeros_like(evicted, dtype=torch.bool))
        return cls(
            keys=gather_tokens(states.keys, indices),
            values=gather_tokens(states.values, indices),
            positions=states.positions.gather(2, indices),
            log_mass=None if states.log_mass is None else states.log_mass.gather(2, indices),
            num_merged=num_merged,
            num_dropped=num_dropped,
            holders=holders_of(states, indices, indices),
        )

    @classmethod
    def empty(cls, states: LayerStates, num_slots: int) -> "Slots":
        """`num_slots` slots for every row and head, none of which exists yet; `write` fills them."""
        batch, heads = states.keys.shape[:2]
        counts = torch.zeros((batch, heads), dtype=torch.long, device=states.keys.device)
        return cls(
            keys=states.keys.new_zeros((batch, heads, num_slots, states.keys.shape[3])),
            values=states.values.new_zeros((batch, heads, num_slots, states.values.shape[3])),
            positions=states.positions.new_zeros((batch, heads, num_slots)),
            num_merged=counts,
            num_dropped=counts.clone(),
            valid=torch.zeros((batch, heads, num_slots), dtype=torch.bool, device=states.keys.device),
            holders=holders_of(states),
        )

    def write(self, part: "Slots", rows: Tensor, heads: slice, columns: Tensor) -> "Slots":
        """Write the slots of `part` over these rows, heads and columns; returns the result, changed in place."""
        result = self
        for name in ("log_mass", "statistics"):
            mine, new = getattr(result, name), getattr(part, name)
            if mine is None and new is not None:
                room = new.new_zeros((*result.positions.shape, *new.shape[3:]))
                result = replace(result, **{name: room})
        rows = rows.unsqueeze(1)
        every_head = torch.arange(self.keys.shape[1], device=rows.device)[heads].unsqueeze(0)
        for name in ("num_merged", "num_dropped"):
            getattr(result, name)[rows, every_head] = getattr(part, name)
        here = (rows.unsqueeze(2), every_head.unsqueeze(2), columns.view(1, 1, -1))
        for name in ("keys", "values", "positions", "log_mass", "statistics"):
            if (new := getattr(part, name)) is not None:
                getattr(result, name)[here] = new
        if result.valid is not None:
            result.valid[here] = True if part.valid is None else part.valid
        if part.holders is not None:
            result.holders[rows, every_head, : part.holders.shape[2]] = part.holders
        return result


def gather_tokens(states: Tensor, indices: Tensor) -> Tensor:
    """`[..., L, D]` and indices `[..., K]` to `[..., K, D]`, a new tensor."""
    *leading, length, dim = states.shape
    if not states.is_contiguous():
        return states.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, dim))
    # whole rows of one matrix: a fraction of the time of `gather`, which looks up every number by itself
    heads = torch.arange(math.prod(leading), device=indices.device).view(*leading, 1)
    return states.view(-1, dim).index_select(0, (indices + length * heads).flatten()).view(*indices.shape, dim)


def holders_of(states: LayerStates, tokens: Tensor | None = None, holders: Tensor | None = None) -> Tensor | None:
    """`Slots.holders`, or `None` where states are not traced.

    Args:
        states: what is folded.
        tokens: `[B, H, N]`, indices of tokens.
        holders: `[B, H, N]`, the index of the token that the slot is named after which holds each, or -1.
    """
    if not states.traced:
        return None
    held = states.positions.new_full((*states.positions.shape[:2], states.seen + 1), ABSENT)
    if tokens is not None:
        places = states.positions.masked_fill(states.positions < 0, states.seen)  # what is no token goes to the end
        held.scatter_(2, places, DROPPED)
        by = states.positions.gather(2, holders.clamp_min(0)).masked_fill(holders < 0, DROPPED)
        held.scatter_(2, places.gather(2, tokens), by)
    return held[..., :-1]


def count_evicted(states: LayerStates, evicted: Tensor, is_merged: Tensor) -> tuple[Tensor, Tensor]:
    """`Slots.num_merged` and `num_dropped` where of the tokens `evicted` `[B, H, E]` those of `is_merged` are folded.

    Together they are E: a dropped slot takes along the tokens that it stood for (its mass), which were merged before.
    """
    num_merged = is_merged.sum(dim=-1)
    along = torch.zeros_like(num_merged)
    if states.log_mass is not None:
        more = states.log_mass.gather(2, evicted).double().expm1().masked_fill(is_merged, 0.0)
        along = more.sum(dim=-1).round().long().clamp_min(0)
    return num_merged - along, evicted.shape[2] - num_merged + along


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """The ascending indices `[B, H, count]` of the highest scores `[B, H, L]`; of equal ones, the later tokens."""
    from_the_end = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return (scores.shape[-1] - 1 - from_the_end).sort(dim=-1).values
