"""The scorer that measured best with what the cache was given."""

from dataclasses import dataclass

from torch import Tensor

from ..states import LayerStates
from .base import Scorer
from .cap import CapScorer
from .keydiff import KeyDiffScorer


@dataclass
class AutoScorer(Scorer):
    """`cap` where the cache has the model, `keydiff` where it has the config only.

    Chosen by what was measured on real weights (`examples/README.md`): of the scorers that read a prompt once and have
    learned nothing, `cap` answers best where heads keep their own shares, and `keydiff` of those that see keys and
    values only. `cache.report()` says which of them runs.
    """

    def resolve(self, linked: bool) -> Scorer:
        return CapScorer() if linked else KeyDiffScorer()

    def score(self, states: LayerStates) -> Tensor:
        return self.resolve(linked=False).score(states)
