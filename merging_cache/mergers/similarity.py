"""Average each evicted value into the survivor with the most similar key: the rule this project starts from."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..linalg import lengths_of
from ..stage import option
from ..states import LayerStates, Slots, Survivors
from .base import Merger
from .routing import Routing, nearest_survivors


@dataclass
class SimilarityMerger(Merger):
    """Merging by key similarity, as proposed to kvpress in its pull request 219 (`MergingPress`).

    Each evicted token i goes to the survivor j with the largest `c = cos(k_i, k_j)`, with the weight
    `w_i = max(c, 0) |v_i| / (|v_i| + |v_j|)`, and `v_j <- (v_j + sum_i w_i v_i) / (1 + sum_i w_i)`. Sinks and recent
    tokens take nothing in. The survivor draws as much attention as before, whatever was folded into it, unless
    `log_mass` is set.

    The options act in this order:

    Args:
        similarity_threshold: tokens less similar than this to every survivor are dropped.
        merge_fraction: of those left, only this fraction (the most similar, rounded up) is merged, the rest dropped.
        max_merge_per_token: at most this many, the most similar, are merged into one survivor; 0 for no limit.
        value_norm_weighting: without it the weight is `max(c, 0)`.
        merge_keys: fold keys too, with the same weights. Off, because averaging keys of different positions was
            measured to harm.
        routing: `"exact"`, to the most similar of all survivors; `"local"`, of those at most `window` positions away,
            in time that grows with the length and not with its square. A token that has no such survivor is dropped.
        window: how many positions that is.
        log_mass: also add `log(1 + sum_i w_i)` to the survivor's attention logits, which needs the model.

    Raises:
        ValueError: if an option is out of its range.
    """

    similarity_threshold: float = option(0.0, minimum=-1, maximum=1)
    merge_fraction: float = option(1.0, minimum=0, maximum=1)
    value_norm_weighting: bool = True
    max_merge_per_token: int = option(0, minimum=0)
    merge_keys: bool = False
    routing: Literal["exact", "local"] = "exact"
    window: int = option(256, minimum=1)
    log_mass: bool = False

    @property
    def has_mass(self) -> bool:
        return self.log_mass

    def merge(self, states: LayerStates, survivors: Survivors) -> Slots:
        if survivors.indices.shape[2] == states.num_tokens:
            return Slots.of_survivors(states, survivors)
        return self._route(states, survivors).slots(states, survivors, keys=self.merge_keys, mass=self.log_mass)

    def _route(self, states: LayerStates, survivors: Survivors) -> Routing:
        window = self.window if self.routing == "local" else None
        routing = nearest_survivors(states.keys, survivors, positions=states.positions, window=window)
        weight = routing.similarity.clamp_min(0.0)
        if self.value_norm_weighting:
            norms = lengths_of(states.values)
            mine = norms.gather(2, routing.evicted)
            theirs = norms.gather(2, survivors.indices).gather(2, routing.target)
            weight = weight * mine / (mine + theirs).clamp_min(torch.finfo(torch.float32).tiny)
        routing = replace(routing, weight=weight).kept_where(routing.similarity >= self.similarity_threshold)
        if self.merge_fraction < 1:
            routing = routing.at_most_fraction(self.merge_fraction)
        if self.max_merge_per_token > 0:
            routing = routing.at_most_per_survivor(self.max_merge_per_token)
        return routing
