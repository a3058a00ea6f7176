"""The merger that measured best with what the cache was given."""

from dataclasses import dataclass

from ..states import LayerStates, Slots, Survivors
from .base import Merger
from .drop import DropMerger
from .refit import RefitMerger


@dataclass
class AutoMerger(Merger):
    """`refit` where the cache has the model, `drop` where it has the config only.

    Chosen by what was measured on real weights (`examples/README.md`): without the model, or where it cannot be linked,
    there are no queries to see and no mass can be added, and what can be merged then answers worse than what is left
    after dropping. `cache.report()` says which of them runs.
    """

    def resolve(self, linked: bool) -> Merger:
        return RefitMerger() if linked else DropMerger()

    def merge(self, states: LayerStates, survivors: Survivors) -> Slots:
        return self.resolve(linked=False).merge(states, survivors)
