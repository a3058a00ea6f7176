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

from ..states import TILE, LayerStates, Survivors, gather_tokens


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

    @property
    def num_merged(self) -> Tensor:
        """`[B, H]`, tokens folded with a weight above 0."""
        return (self.weight > 0).sum(dim=-1)

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

    def fold(self, states: Tensor, survivors: Survivors) -> Tensor:
        """The weighted mean `(s_j + sum_i w_i s_i) / (1 + sum_i w_i)` of every survivor and what is folded into it.

        `states` are `[B, H, L, D]`, the result is `[B, H, K, D]` in their dtype, summed in fp32. Survivors into which
        nothing is folded keep their exact bits.
        """
        indices = survivors.indices
        folded = gather_tokens(states, indices)
        batch, heads, kept, dim = folded.shape
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
            bounds = torch.searchsorted(slot, torch.arange(n * kept + 1, device=slot.device))
            lengths = bounds.diff()
            tokens = self.evicted.flatten(0, 1)[rows].flatten()[order]
            head = order // target.shape[1] + rows.start
            flat = states.flatten(0, 1)
            weights = weight.flatten()[order].unsqueeze(1)
            weighted = flat[head, tokens].float() * weights
            total = torch.segment_reduce(weighted, "sum", lengths=lengths, axis=0)
            mass = torch.segment_reduce(weights.contiguous(), "sum", lengths=lengths, axis=0)
            touched = lengths.nonzero().squeeze(1)
            own = folded.view(batch * heads, kept, dim)[rows].flatten(0, 1)
            mean = (own[touched].float() + total[touched]) / (1.0 + mass[touched])
            folded.view(batch * heads * kept, dim)[rows.start * kept + touched] = mean.to(states.dtype)
        return folded


def nearest_survivors(states: LayerStates, survivors: Survivors) -> Routing:
    """Route every evicted token to the unprotected survivor with the largest cosine similarity of keys.

    Ties go to the later survivor. Weights are 1 where there is a survivor to go to, else 0.
    """
    evicted = survivors.evicted(states.num_tokens)
    batch, heads, count = evicted.shape
    kept = survivors.indices.shape[2]
    similarity = torch.full((batch * heads, count), -torch.inf, device=evicted.device)
    target = torch.zeros((batch * heads, count), dtype=torch.long, device=evicted.device)

    forbidden = torch.zeros_like(survivors.indices, dtype=torch.bool)
    if survivors.protected is not None:
        forbidden |= survivors.protected
    bias = torch.zeros(forbidden.shape, device=forbidden.device).masked_fill(forbidden, -torch.inf).flatten(0, 1)

    keys, indices, lost = states.keys.flatten(0, 1), survivors.indices.flatten(0, 1), evicted.flatten(0, 1)
    for rows in head_slices(batch * heads, 256 * kept):
        # the first maximum wins, so the later survivors come first
        candidates = normalize(_take(keys[rows], indices[rows].flip(1)).float(), dim=-1)
        candidate_bias = bias[rows].flip(1).unsqueeze(1)
        step = max(1, TILE // (candidates.shape[0] * kept))
        for start in range(0, count, step):
            tile = normalize(_take(keys[rows], lost[rows, start : start + step]).float(), dim=-1)
            best = torch.baddbmm(candidate_bias, tile, candidates.mT).max(dim=-1)
            similarity[rows, start : start + step] = best.values
            target[rows, start : start + step] = kept - 1 - best.indices
    similarity = similarity.view(batch, heads, count)
    return Routing(evicted, target.view(batch, heads, count), similarity, (similarity > -torch.inf).float())


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
