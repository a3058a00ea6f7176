"""Hard eviction: the control every merger has to beat."""

from dataclasses import dataclass

from ..states import LayerStates, Slots, Survivors
from .base import Merger


@dataclass
class DropMerger(Merger):
    """The survivors stay as they are, the evicted are gone."""

    merges_values = False

    def merge(self, states: LayerStates, survivors: Survivors) -> Slots:
        return Slots.of_survivors(states, survivors)
