"""Every survivor draws the attention that the tokens folded into it would have drawn."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..stage import option
from ..states import TILE, LayerStates, Slots, Survivors
from .reference import ReferenceMerger, full_attention
from .routing import Routing, nearest_survivors


@dataclass
class MassMerger(ReferenceMerger):
    """Weights from observed attention: exact for one query, and for any queries whose logit gaps are constant.

    With a_i the attention that token i draws from each of the reference queries, the ratio of token i to survivor j is
    `r_ij = <a_i, a_j> / <a_j, a_j>`. Each evicted token goes to one survivor, `v_j <- (v_j + sum_i r_ij v_i) /
    (1 + sum_i r_ij)` and `log_mass_j <- log_mass_j + log(1 + sum_i r_ij)`. Sinks and recent tokens take nothing in.

    Args:
        queries: see `ReferenceMerger`.
        routing: `"attention"`, to the survivor whose attention explains most of the token's, the largest
            `<a_i, a_j>^2 / <a_j, a_j>`; `"keys"`, to the one with the most similar key.
        least_explained: tokens of which a smaller fraction `<a_i, a_j>^2 / (<a_i, a_i> <a_j, a_j>)` is explained are
            dropped.
        similarity_threshold: with `"keys"`, tokens less similar than this to every survivor are dropped.
        max_ratio: the largest r_ij; larger ones are cut.
        max_added: the largest sum of r_ij of a slot; they are scaled down to it.

    Raises:
        ValueError: if an option is out of its range.
    """

    has_mass = True

    routing: Literal["attention", "keys"] = "keys"
    least_explained: float = option(0.0, minimum=0, maximum=1)
    similarity_threshold: float = option(0.0, minimum=-1, maximum=1)
    max_ratio: float = option(3.0, minimum=0)
    max_added: float = option(30.0, minimum=0)

    def merge_heads(self, states: LayerStates, survivors: Survivors) -> Slots:
        attention = full_attention(states).mT  # [B, H, L, R]
        routing = nearest_survivors(states.keys if self.routing == "keys" else attention, survivors)
        routing = self._weighted(routing, attention, survivors)
        if self.routing == "keys":
            routing = routing.kept_where(routing.similarity >= self.similarity_threshold)
        return routing.capped(self.max_added, states, survivors).slots(states, survivors, mass=True)

    def _weighted(self, routing: Routing, attention: torch.Tensor, survivors: Survivors) -> Routing:
        """With the ratio r_ij as weights, 0 where too little of the token is explained."""
        batch, heads, _, asked = attention.shape
        index = survivors.indices.gather(2, routing.target)
        ratio = torch.zeros_like(routing.weight)
        step = max(1, TILE // (batch * heads * asked))
        for first in range(0, ratio.shape[2], step):
            tile = slice(first, first + step)
            mine, theirs = (
                attention.gather(2, one[:, :, tile].unsqueeze(-1).expand(-1, -1, -1, asked))
                for one in (routing.evicted, index)
            )
            both, own, other = (mine * theirs).sum(-1), mine.square().sum(-1), theirs.square().sum(-1)
            tiny = torch.finfo(both.dtype).tiny
            explained = both.square() / (own * other).clamp_min(tiny)
            ratio[:, :, tile] = (both / other.clamp_min(tiny)) * (explained >= self.least_explained) * (other > 0)
        return replace(routing, weight=routing.weight * ratio.clamp_max(self.max_ratio))
