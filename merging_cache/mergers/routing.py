"""Finds each evicted token's survivor and folds tokens into survivors, in memory that grows with L and not with L^2.

First a plan (`Routing`: for every evicted token a target and a weight), then its application to as many tensors as the
merger likes. Both work on a few heads and a tile of tokens at a time. Sums run over tokens sorted by target, so a fold
gives the same bits each time, on GPUs too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

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

    def capped(self, most: float, num_slots: int) -> "Routing":
        """With the weights of what is folded into a slot scaled down where their sum is above `most`."""
        totals = self.totals(num_slots).gather(2, self.target).clamp_min(torch.finfo(torch.float32).tiny)
        return replace(self, weight=self.weight * (most / totals).clamp_max(1.0))

    def slots(self, states: LayerStates, survivors: Survivors, keys: bool = False, mass: bool = False) -> Slots:
        """The survivors with the others folded into them.

        Args:
            states, survivors: what the routing was made of.
            keys: whether to fold keys, too.
            mass: whether a slot draws as much more attention as was folded into it: `log(1 + sum_i w_i)` is added to
                its log-mass.
        """
        num_merged, num_dropped = count_evicted(states, self.evicted, self.weight > 0)
        values, added = self.fold(states.values, survivors)
        log_mass = None if states.log_mass is None else states.log_mass.gather(2, survivors.indices)
        if mass:
            log_mass = added.log1p() if log_mass is None else log_mass + added.log1p()
        return Slots(
            keys=self.fold(states.keys, survivors)[0] if keys else gather_tokens(states.keys, survivors.indices),
            values=values,
            positions=states.positions.gather(2, survivors.indices),
            log_mass=log_mass,
            num_merged=num_merged,
            num_dropped=num_dropped,
            holders=self.holders(states, survivors),
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
        every = torch.arange(self.weight.shape[2], device=self.weight.device).expand_as(self.target)
        ones = torch.ones_like(self.weight).unsqueeze(-1)
        return weighted_sums(ones, every, self.target, self.weight, num_slots).squeeze(-1)

    def fold(self, states: Tensor, survivors: Survivors) -> tuple[Tensor, Tensor]:
        """The weighted mean `(s_j + sum_i w_i s_i) / (1 + sum_i w_i)` of every survivor and what is folded into it.

        `states` are `[B, H, L, D]`, the means are `[B, H, K, D]` in their dtype, summed in fp32. Survivors into which
        nothing is folded keep their exact bits. Also returned are the sums of the weights, `[B, H, K]`.
        """
        kept = survivors.indices.shape[2]
        added = self.totals(kept)
        share = (1.0 + added).reciprocal()
        every = torch.arange(kept, device=share.device).expand_as(survivors.indices)
        members = torch.cat([survivors.indices, self.evicted], dim=2)
        slots = torch.cat([every, self.target], dim=2)
        weights = torch.cat([share, self.weight * share.gather(2, self.target)], dim=2)
        return weighted_sums(states, members, slots, weights, kept, dtype=states.dtype), added

    def sums(self, states: Tensor, num_slots: int) -> Tensor:
        """`[B, H, K, D]` in fp32, the weighted sums of what is folded into each survivor, itself left out."""
        return weighted_sums(states, self.evicted, self.target, self.weight, num_slots)


def weighted_sums(
    states: Tensor, tokens: Tensor, slots: Tensor, weights: Tensor, num_slots: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`[B, H, K, D]`, for each of K slots the sum of `weights` times `states`, in fp32 and of ascending tokens.

    Args:
        states: `[B, H, L, D]`.
        tokens, slots, weights: `[B, H, N]`, which tokens are summed, into which slot, and by what they are multiplied.
        num_slots: K.
        dtype: of the result.
    """
    batch, heads, length, dim = states.shape
    sums = []
    flat, tokens, slots, weights = (part.flatten(0, 1) for part in (states, tokens, slots, weights))
    for rows in head_slices(batch * heads, length * dim if states.dtype != torch.float32 else tokens.shape[1]):
        number = torch.arange(rows.stop - rows.start, device=states.device).unsqueeze(1)
        slot, order = (slots[rows] + num_slots * number).flatten().sort(stable=True)
        bags = torch.searchsorted(slot, torch.arange(len(number) * num_slots + 1, device=slot.device))
        of_rows = embedding_bag(
            (tokens[rows] + length * number).flatten()[order],
            flat[rows].flatten(0, 1).float(),
            bags,
            mode="sum",
            per_sample_weights=weights[rows].flatten()[order],
            include_last_offset=True,
        )
        sums.append(of_rows.to(dtype))
    return (sums[0] if len(sums) == 1 else torch.cat(sums)).view(batch, heads, num_slots, dim)


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
    lengths = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float32)
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
