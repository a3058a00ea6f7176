"""Finds each evicted token's survivor and folds tokens into survivors, in memory that grows with L and not with L^2.

First a plan (`Routing`: for every evicted token a target and a weight), then its application to as many tensors as the
merger likes. Both work on a few heads and a tile of tokens at a time. Sums run over tokens sorted by target, so a fold
gives the same bits each time, on GPUs too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..states import DROPPED, TILE, LayerStates, Slots, Survivors, count_evicted, gather_tokens, holders_of


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
        slots = Slots.of_survivors(states, survivors)
        num_merged, num_dropped = count_evicted(states, self.evicted, self.weight > 0)
        values, added = self.fold(states.values, survivors)
        log_mass = slots.log_mass
        if mass:
            log_mass = added.log1p() if log_mass is None else log_mass + added.log1p()
        return replace(
            slots,
            keys=self.fold(states.keys, survivors)[0] if keys else slots.keys,
            values=values,
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
        return replace(self, evicted=every).sums(torch.ones_like(self.weight).unsqueeze(-1), num_slots).squeeze(-1)

    def fold(self, states: Tensor, survivors: Survivors) -> tuple[Tensor, Tensor]:
        """The weighted mean `(s_j + sum_i w_i s_i) / (1 + sum_i w_i)` of every survivor and what is folded into it.

        `states` are `[B, H, L, D]`, the means are `[B, H, K, D]` in their dtype, summed in fp32. Survivors into which
        nothing is folded keep their exact bits. Also returned are the sums of the weights, `[B, H, K]`.
        """
        own = gather_tokens(states, survivors.indices)
        batch, heads, kept, dim = own.shape
        folded = own.view(batch * heads * kept, dim)
        added = torch.zeros((batch * heads * kept, 1), device=states.device)
        for first, touched, total, mass in self._segments(states, kept):
            mean = (folded[first + touched].float() + total) / (1.0 + mass)
            folded[first + touched] = mean.to(states.dtype)
            added[first + touched] = mass
        return own, added.view(batch, heads, kept)

    def sums(self, states: Tensor, num_slots: int) -> Tensor:
        """`[B, H, K, D]` in fp32, the weighted sums of what is folded into each survivor, itself left out."""
        batch, heads, _, dim = states.shape
        sums = torch.zeros((batch * heads * num_slots, dim), device=states.device)
        for first, touched, total, _ in self._segments(states, num_slots):
            sums[first + touched] = total
        return sums.view(batch, heads, num_slots, dim)

    def _segments(self, states: Tensor, kept: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Some heads at a time: the first of their slots, which of them take something in, and its sum and weight."""
        batch, heads, _, dim = states.shape
        flat = states.flatten(0, 1)
        for rows in head_slices(batch * heads, states.shape[2] * dim):
            target, weight = self.target.flatten(0, 1)[rows], self.weight.flatten(0, 1)[rows]
            n = target.shape[0]
            slot = (target + kept * torch.arange(n, device=target.device).unsqueeze(1)).masked_fill(
                weight <= 0, n * kept
            )
            slot, order = slot.flatten().sort(stable=True)
            merged = int((slot < n * kept).sum())
            if merged == 0:
                continue
            slot, order = slot[:merged], order[:merged]
            lengths = torch.searchsorted(slot, torch.arange(n * kept + 1, device=slot.device)).diff()
            tokens = self.evicted.flatten(0, 1)[rows].flatten()[order]
            weights = weight.flatten()[order].unsqueeze(1)
            weighted = flat[order // target.shape[1] + rows.start, tokens].float() * weights
            total = torch.segment_reduce(weighted, "sum", lengths=lengths, axis=0)
            mass = torch.segment_reduce(weights.contiguous(), "sum", lengths=lengths, axis=0)
            touched = lengths.nonzero().squeeze(1)
            yield rows.start * kept, touched, total[touched], mass[touched]


def nearest_survivors(features: Tensor, survivors: Survivors, by_distance: bool = False) -> Routing:
    """Route every evicted token to the unprotected survivor whose features are most like its own.

    Args:
        features: `[B, H, L, F]`, of every token: keys, say.
        survivors: which tokens survive.
        by_distance: the closest instead of the one with the largest cosine.

    Returns:
        a routing with weights of 1 where there is a survivor to go to, else 0. Its similarities are cosines, or minus
        half the squared distances. Ties go to the later survivor.
    """
    evicted = survivors.evicted(features.shape[2])
    batch, heads, count = evicted.shape
    kept = survivors.indices.shape[2]
    similarity = torch.full((batch * heads, count), -torch.inf, device=evicted.device)
    target = torch.zeros((batch * heads, count), dtype=torch.long, device=evicted.device)

    forbidden = torch.zeros_like(survivors.indices, dtype=torch.bool)
    if survivors.protected is not None:
        forbidden |= survivors.protected
    bias = torch.zeros(forbidden.shape, device=forbidden.device).masked_fill(forbidden, -torch.inf).flatten(0, 1)

    def prepared(tokens: Tensor) -> Tensor:
        return tokens.float() if by_distance else normalize(tokens.float(), dim=-1)

    flat, indices, lost = features.flatten(0, 1), survivors.indices.flatten(0, 1), evicted.flatten(0, 1)
    for rows in head_slices(batch * heads, 256 * kept):
        # the first maximum wins, so the later survivors come first
        candidates = prepared(_take(flat[rows], indices[rows].flip(1)))
        candidate_bias = bias[rows].flip(1)
        if by_distance:
            candidate_bias = candidate_bias - candidates.square().sum(dim=-1) / 2
        step = max(1, TILE // (candidates.shape[0] * kept))
        for start in range(0, count, step):
            tile = prepared(_take(flat[rows], lost[rows, start : start + step]))
            best = torch.baddbmm(candidate_bias.unsqueeze(1), tile, candidates.mT).max(dim=-1)
            value = best.values - tile.square().sum(dim=-1) / 2 if by_distance else best.values
            similarity[rows, start : start + step] = value
            target[rows, start : start + step] = kept - 1 - best.indices
    similarity = similarity.view(batch, heads, count)
    return Routing(evicted, target.view(batch, heads, count), similarity, (similarity > -torch.inf).float())


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


def _take(states: Tensor, indices: Tensor) -> Tensor:
    """`[N, L, D]` and `[N, K]` to `[N, K, D]`."""
    return states.gather(1, indices.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _most_similar_first(similarity: Tensor) -> Tensor:
    """Indices that sort `[B, H, E]` by falling similarity, of equal ones the later first."""
    from_the_end = similarity.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    return similarity.shape[-1] - 1 - from_the_end
