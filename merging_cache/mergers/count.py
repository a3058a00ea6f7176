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
        routing: `"cosine"`, to the key with the largest cosine; `"distance"`, to the closest.
        similarity_threshold: with `"cosine"`, tokens less similar than this to every survivor are dropped.
        merge_keys: fold keys too. Off, because averaging keys of different positions was measured to harm.

    Raises:
        ValueError: if an option is out of its range.
    """

    has_mass = True

    routing: Literal["cosine", "distance"] = "cosine"
    similarity_threshold: float = option(0.0, minimum=-1, maximum=1)
    merge_keys: bool = False

    def merge(self, states: LayerStates, survivors: Survivors) -> Slots:
        if survivors.indices.shape[2] == states.num_tokens:
            return Slots.of_survivors(states, survivors)
        routing = nearest_survivors(states.keys, survivors, by_distance=self.routing == "distance")
        mass = masses(states)
        theirs = mass.gather(2, survivors.indices).gather(2, routing.target)
        weighted = replace(routing, weight=routing.weight * mass.gather(2, routing.evicted) / theirs)
        if self.routing == "cosine":
            weighted = weighted.kept_where(routing.similarity >= self.similarity_threshold)
        return weighted.slots(states, survivors, keys=self.merge_keys, mass=True)
