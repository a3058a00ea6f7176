"""Every survivor draws the attention that the tokens folded into it would have drawn."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..stage import option
from ..states import TILE, LayerStates, Slots, Survivors, gather_tokens
from .reference import ReferenceMerger, full_attention
from .routing import Routing, nearest_survivors


@dataclass
class MassMerger(ReferenceMerger):
    """Weights from observed attention: exact for one query, and for any queries whose logit gaps are constant.

    With a_i the attention that token i draws from each of n reference queries, the ratio of token i to survivor j is
    `r_ij = <a_i, a_j> / <a_j, a_j>`. Each evicted token goes to one survivor, `v_j <- (v_j + sum_i r_ij v_i) /
    (1 + sum_i r_ij)` and `log_mass_j <- log_mass_j + log(1 + sum_i r_ij)`. Sinks and recent tokens take nothing in.

    Folding i into j leaves a query with the output o wrong by `(r_ij a_j - a_i) (v_i - o)`, and r_ij as above is least
    squares on the reference queries. Queries to come may look up a single token instead, of which these have few: one
    that looks at j alone is given `r_ij (v_i - v_j)` too much. With a `lookup_share` of such queries, each of the L
    tokens being looked up as often, least squares is

        r_ij = <a_i, a_j> / (<a_j, a_j> + n (lookup_share / L) |v_i - v_j|^2 / s^2)

    where s^2 is the variance of the head's values. Tokens whose values are alike are folded as before, others hardly
    where little attention asks for it, so that what was kept to be looked up stays what it is.

    Args:
        queries: see `ReferenceMerger`.
        routing: `"attention"`, to the survivor whose attention explains most of the token's, the largest
            `<a_i, a_j>^2 / <a_j, a_j>`; `"keys"`, to the one with the most similar key; `"local"`, of those at most
            `window` positions away, in time that grows with the length and not with its square.
        window: how many positions that is. A token that has no such survivor is dropped.
        lookup_share: the share of the queries to come that are taken to look up a single token.
        least_explained: tokens of which a smaller fraction `<a_i, a_j>^2 / (<a_i, a_i> <a_j, a_j>)` is explained are
            dropped.
        similarity_threshold: unless by `"attention"`, tokens less similar than this to every survivor are dropped.
        max_ratio: the largest r_ij; larger ones are cut.
        max_added: the largest sum of r_ij of a slot; they are scaled down to it.

    Raises:
        ValueError: if an option is out of its range.
    """

    has_mass = True

    routing: Literal["attention", "keys", "local"] = "keys"
    window: int = option(256, minimum=1)
    lookup_share: float = option(0.0, minimum=0, maximum=1)
    least_explained: float = option(0.0, minimum=0, maximum=1)
    similarity_threshold: float = option(-1.0, minimum=-1, maximum=1)
    max_ratio: float = option(3.0, minimum=0)
    max_added: float = option(30.0, minimum=0)

    def merge_heads(self, states: LayerStates, survivors: Survivors) -> Slots:
        attention = full_attention(states).mT  # [B, H, L, n], of which rows are taken
        routing = nearest_survivors(
            attention if self.routing == "attention" else states.keys,
            survivors,
            positions=states.positions,
            window=self.window if self.routing == "local" else None,
        )
        routing = self._weighted(routing, attention, states.values, survivors)
        if self.routing != "attention":
            routing = routing.kept_where(routing.similarity >= self.similarity_threshold)
        return routing.slots(states, survivors, mass=True, most=self.max_added)

    def _weighted(self, routing: Routing, attention: Tensor, values: Tensor, survivors: Survivors) -> Routing:
        """With the ratio r_ij as weights, 0 where too little of the token is explained."""
        batch, heads, length, asked = attention.shape
        by_survivor = gather_tokens(attention, survivors.indices)
        other = by_survivor.square().sum(dim=-1).gather(2, routing.target)  # <a_j, a_j>
        both, apart = torch.zeros_like(other), torch.zeros_like(other)  # <a_i, a_j>, |v_i - v_j|^2
        explained = other > 0
        # small enough for the processor's own memory
        step = max(1, TILE // 16 // (batch * heads * max(asked, values.shape[3])))
        for first in range(0, both.shape[2], step):
            part = slice(first, first + step)
            mine, theirs = routing.evicted[:, :, part], routing.target[:, :, part]
            a_i, a_j = gather_tokens(attention, mine), gather_tokens(by_survivor, theirs)
            both[:, :, part] = a_j.mul_(a_i).sum(dim=-1)
            if self.lookup_share:
                between = gather_tokens(values, survivors.indices.gather(2, theirs)).float()
                between.sub_(gather_tokens(values, mine))
                apart[:, :, part] = between.square_().sum(dim=-1)
            if self.least_explained:
                least = self.least_explained * a_i.square_().sum(dim=-1) * other[:, :, part]
                explained[:, :, part] &= both[:, :, part].square() >= least
        asking, tiny = other, torch.finfo(other.dtype).tiny
        if self.lookup_share:
            # attention sums to 1 for every query that there is
            looked_up = self.lookup_share / length * attention.sum(dim=(2, 3)).unsqueeze(-1)  # [B, H, 1]
            spread = values.float() - values.float().mean(dim=2, keepdim=True)
            variance = (spread.square_().sum(dim=(2, 3)) / length).unsqueeze(-1).clamp_min(tiny)  # [B, H, 1]
            asking = other + looked_up * apart / variance
        ratio = both / asking.clamp_min(tiny) * explained
        return replace(routing, weight=routing.weight * ratio.clamp_max(self.max_ratio))
