"""Every survivor stands for all the tokens folded into it, one like the other."""

from dataclasses import dataclass, replace
from typing import Literal

from ..stage import option
from ..states import LayerStates, Slots, Survivors
from .base import Merger
from .routing import masses, nearest_survivors


@dataclass
class CountMerger(Merger):
    """Mean values and log-counts (proportional attention, ToMe, arXiv:2210.09461; ZeroMerge, arXiv:2503.10714).

    Each evicted token i goes to the survivor j with the most similar key. With m the number of tokens that each stands
    for, `v_j <- (m_j v_j + sum_i m_i v_i) / (m_j + sum_i m_i)` and `log_mass_j <- log(m_j + sum_i m_i)`, which is added
    to the survivor's attention logits. Where keys are equal nothing is lost: the output is that of the full cache.
    Sinks and recent tokens take nothing in.

    Args:
        routing: `"cosine"`, to the key with the largest cosine; `"distance"`, to the closest; `"local"`, to the largest
            cosine at most `window` positions away, in time that grows with the length and not with its square.
        window: how many positions that is. A token that has no such survivor is dropped.
        similarity_threshold: unless by `"distance"`, tokens less similar than this to every survivor are dropped.
        merge_keys: fold keys too. Off, because averaging keys of different positions was measured to harm.

    Raises:
        ValueError: if an option is out of its range.
    """

    has_mass = True

    routing: Literal["cosine", "distance", "local"] = "cosine"
    window: int = option(256, minimum=1)
    similarity_threshold: float = option(0.0, minimum=-1, maximum=1)
    merge_keys: bool = False

    def merge(self, states: LayerStates, survivors: Survivors) -> Slots:
        if survivors.indices.shape[2] == states.num_tokens:
            return Slots.of_survivors(states, survivors)
        routing = nearest_survivors(
            states.keys,
            survivors,
            by_distance=self.routing == "distance",
            positions=states.positions,
            window=self.window if self.routing == "local" else None,
        )
        mass = masses(states)
        theirs = mass.gather(2, survivors.indices).gather(2, routing.target)
        weighted = replace(routing, weight=routing.weight * mass.gather(2, routing.evicted) / theirs)
        if self.routing != "distance":
            weighted = weighted.kept_where(routing.similarity >= self.similarity_threshold)
        return weighted.slots(states, survivors, keys=self.merge_keys, mass=True)
