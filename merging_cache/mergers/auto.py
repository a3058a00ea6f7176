"""The merger that measured best with what the cache was given."""

from dataclasses import dataclass

from ..states import LayerStates, Slots, Survivors
from .base import Merger
from .mass import MassMerger
from .similarity import SimilarityMerger


@dataclass
class AutoMerger(Merger):
    """`mass` with a `lookup_share` of 0.002 where the cache has the model, `similarity` where it has the config only.

    Chosen by what `examples/compare_mergers.py` measured. Without the model, or where it cannot be linked, there are no
    queries to see and no mass can be added. `cache.report()` says which of them runs.
    """

    def resolve(self, linked: bool) -> Merger:
        return MassMerger(lookup_share=0.002) if linked else SimilarityMerger()

    def merge(self, states: LayerStates, survivors: Survivors) -> Slots:
        return self.resolve(linked=False).merge(states, survivors)
