"""Finds each evicted token's survivor and folds tokens into survivors, in memory that grows with L and not with L^2.

First a plan (`Routing`: for every evicted token a target and a weight), then its application to as many tensors as the
merger likes. Both work on a few heads and a tile of tokens at a time. Sums run over tokens sorted by target, so a fold
gives the same bits each time, on GPUs too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..linalg import lengths_of
from ..states import DROPPED, TILE, LayerStates, Slots, Survivors, count_evicted, gather_tokens, holders_of
from .nearest import Search


@dataclass(frozen=True)
class Routing:
    """Where each evicted token goes.

    Args:
        evicted: `[B, H, E]`, ascending indices of the evicted tokens.
        target: `[B, H, E]`, for each the index (among the K survivors) of the one it is folded into.
        similarity: `[B, H, E]`, how alike the two are, `-inf` where there is nothing to fold into.
        weight: `[B, H, E]`, how much of the token is folded; 0 where it is dropped.
    """

    evicted: Tensor
    target: Tensor
    similarity: Tensor
    weight: Tensor

    def at_most_fraction(self, fraction: float) -> "Routing":
        """Only the most similar `fraction` of the tokens that have a weight (rounded up) keep it."""
        eligible = self.weight > 0
        allowed = (eligible.sum(dim=-1, keepdim=True).double() * fraction).ceil()
        order = _most_similar_first(self.similarity.masked_fill(~eligible, -torch.inf))
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        return replace(self, weight=self.weight.masked_fill(rank >= allowed, 0.0))

    def at_most_per_survivor(self, count: int) -> "Routing":
        """Only the `count` most similar tokens of each survivor keep their weight."""
        eligible = self.weight > 0
        order = _most_similar_first(self.similarity.masked_fill(~eligible, -torch.inf))
        grouped = self.target.gather(-1, order).sort(dim=-1, stable=True)
        order = order.gather(-1, grouped.indices)
        # among equal targets the eligible come first, being more similar than -inf
        index = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank_in_group = index - torch.searchsorted(grouped.values, grouped.values)
        rank = torch.empty_like(order).scatter_(-1, order, rank_in_group)
        return replace(self, weight=self.weight.masked_fill(rank >= count, 0.0))

    def kept_where(self, condition: Tensor) -> "Routing":
        """Only tokens for which `condition` `[B, H, E]` is true keep their weight."""
        return replace(self, weight=self.weight * condition)

    def slots(
        self, states: LayerStates, survivors: Survivors, keys: bool = False, mass: bool = False, most: float = math.inf
    ) -> Slots:
        """The survivors with the others folded into them: `(v_j + sum_i w_i v_i) / (1 + sum_i w_i)`, summed in fp32.

        Survivors into which nothing is folded keep their exact bits.

        Args:
            states, survivors: what the routing was made of.
            keys: whether to fold keys, too.
            mass: whether a slot draws as much more attention as was folded into it: `log(1 + sum_i w_i)` is added to
                its log-mass.
            most: the largest `sum_i w_i`; the weights of a slot are scaled down to it.
        """
        kept = survivors.indices.shape[2]
        every = torch.arange(kept, device=self.target.device).expand_as(survivors.indices)
        members = torch.cat([survivors.indices, self.evicted], dim=2)
        segments = Segments(members, torch.cat([every, self.target], dim=2), kept)
        own, weight = torch.ones_like(every, dtype=self.weight.dtype), self.weight
        total = segments.totals(torch.cat([own, weight], dim=2))
        if most < math.inf:
            scale = (most / (total - 1).clamp_min(torch.finfo(total.dtype).tiny)).clamp_max(1.0)
            total, weight = torch.where(scale < 1, 1 + most, total), weight * scale.gather(2, self.target)
        num_merged, num_dropped = count_evicted(states, self.evicted, weight > 0)
        share = total.reciprocal()
        weights = torch.cat([own * share, weight * share.gather(2, self.target)], dim=2)

        def folded(part: Tensor) -> Tensor:
            return segments.sums(part, weights, part.dtype)

        log_mass = None if states.log_mass is None else states.log_mass.gather(2, survivors.indices)
        if mass:
            log_mass = total.log() if log_mass is None else log_mass + total.log()
        return Slots(
            keys=folded(states.keys) if keys else gather_tokens(states.keys, survivors.indices),
            values=folded(states.values),
            positions=states.positions.gather(2, survivors.indices),
            log_mass=log_mass,
            num_merged=num_merged,
            num_dropped=num_dropped,
            holders=replace(self, weight=weight).holders(states, survivors),
        )

    def holders(self, states: LayerStates, survivors: Survivors) -> Tensor | None:
        """`Slots.holders`: survivors hold themselves and what has a weight."""
        if not states.traced:
            return None
        by = survivors.indices.gather(2, self.target).masked_fill(self.weight <= 0, DROPPED)
        return holders_of(
            states, torch.cat([survivors.indices, self.evicted], 2), torch.cat([survivors.indices, by], 2)
        )

    def totals(self, num_slots: int) -> Tensor:
        """`[B, H, K]`, the sum of the weights of what is folded into each of the K slots."""
        return Segments(self.evicted, self.target, num_slots).totals(self.weight)

    def sums(self, states: Tensor, num_slots: int) -> Tensor:
        """`[B, H, K, D]` in fp32, the weighted sums of what is folded into each of the K slots."""
        return Segments(self.evicted, self.target, num_slots).sums(states, self.weight, torch.float32)


class Segments:
    """Sums over the tokens that go to the same slot, in fp32 and of ascending tokens: the same bits each time.

    Args:
        tokens, slots: `[B, H, N]`, which tokens are summed, and into which slot each goes.
        num_slots: K.
    """

    def __init__(self, tokens: Tensor, slots: Tensor, num_slots: int):
        self._tokens, self._num_slots = tokens, num_slots
        first_slots = num_slots * torch.arange(slots[..., 0].numel(), device=slots.device).view(*slots.shape[:2], 1)
        by_slot = (slots + first_slots).flatten().sort(stable=True)  # head by head, each with N tokens
        self._order = by_slot.indices
        self._starts = torch.searchsorted(
            by_slot.values, torch.arange(first_slots.numel() * num_slots + 1, device=slots.device)
        )

    def totals(self, weights: Tensor) -> Tensor:
        """`[B, H, K]`, the sums of the weights `[B, H, N]`."""
        return self._bags(weights.flatten().unsqueeze(1), self._order, self._starts).view(*weights.shape[:2], -1)

    def sums(self, states: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, H, K, D]`, the sums of `states` `[B, H, L, D]` times the weights `[B, H, N]`, at last in this dtype."""
        batch, heads, length, dim = states.shape
        count, kept = self._tokens.shape[2], self._num_slots
        rows = torch.arange(batch * heads, device=states.device).view(batch, heads, 1)
        token = (self._tokens + length * rows).flatten()[self._order]
        weight = weights.flatten()[self._order]
        flat = states.flatten(0, 2)
        sums = []
        # only what has to be converted to fp32 takes room
        for some in head_slices(batch * heads, 0 if states.dtype == torch.float32 else length * dim):
            members = slice(some.start * count, some.stop * count)
            sums.append(
                self._bags(
                    flat[some.start * length : some.stop * length].float(),
                    token[members] - some.start * length,
                    self._starts[some.start * kept : some.stop * kept + 1] - members.start,
                    weight[members],
                ).to(dtype)
            )
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).view(batch, heads, kept, dim)

    @staticmethod
    def _bags(rows: Tensor, order: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
        return embedding_bag(order, rows, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def nearest_survivors(
    features: Tensor,
    survivors: Survivors,
    by_distance: bool = False,
    positions: Tensor | None = None,
    window: int | None = None,
) -> Routing:
    """Route every evicted token to the unprotected survivor whose features are most like its own.

    Args:
        features: `[B, H, L, F]`, of every token: keys, say.
        survivors: which tokens survive.
        by_distance: the closest instead of the one with the largest cosine.
        positions, window: `[B, H, L]`, the positions of all tokens, and how far away a survivor may be; `None` for any.

    Returns:
        a routing with weights of 1 where there is a survivor to go to, else 0. Its similarities are cosines, or minus
        half the squared distances. Ties go to the later survivor.
    """
    evicted = survivors.evicted(features.shape[2])
    batch, heads, count = evicted.shape
    kept = survivors.indices.shape[2]
    flat, indices = features.flatten(0, 1), survivors.indices.flatten(0, 1)
    bias = torch.zeros(indices.shape, device=indices.device)
    if survivors.protected is not None:
        bias.masked_fill_(survivors.protected.flatten(0, 1), -torch.inf)
    flat = flat.float() if flat.dtype == torch.float64 else flat
    lengths = lengths_of(flat)
    scale = None
    if by_distance:
        bias -= lengths.gather(1, indices).square() / 2
    else:
        scale = lengths.clamp_min(1e-12).reciprocal()
    # of equal candidates the first wins, so the later survivors come first
    similarity, place = Search(
        flat,
        scale,
        evicted.flatten(0, 1),
        indices.flip(1),
        bias.flip(1),
        unbiased=not by_distance,
        positions=None if positions is None else positions.flatten(0, 1),
        window=window,
    ).run()
    if by_distance:
        similarity = similarity - lengths.gather(1, evicted.flatten(0, 1)).square() / 2
    similarity = similarity.view(batch, heads, count)
    return Routing(evicted, (kept - 1 - place).view(batch, heads, count), similarity, (similarity > -torch.inf).float())


def masses(states: LayerStates) -> Tensor:
    """`[B, H, L]` in fp32, how many tokens' attention each token draws: 1 where no fold gave it more."""
    if states.log_mass is None:
        return torch.ones(states.positions.shape, device=states.keys.device)
    return states.log_mass.float().exp()


def head_slices(heads: int, elements_per_head: int) -> Iterator[slice]:
    """Slices over flattened rows and heads, each of about `TILE` elements and at least one head."""
    step = max(1, TILE // max(1, elements_per_head))
    for start in range(0, heads, step):
        yield slice(start, min(start + step, heads))


def _most_similar_first(similarity: Tensor) -> Tensor:
    """Indices that sort `[B, H, E]` by falling similarity, of equal ones the later first."""
    from_the_end = similarity.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    return similarity.shape[-1] - 1 - from_the_end
