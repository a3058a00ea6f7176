"""The scorer that measured best with what the cache was given."""

from dataclasses import dataclass

from torch import Tensor

from ..states import LayerStates
from .base import Scorer
from .keydiff import KeyDiffScorer
from .probe import ProbeScorer


@dataclass
class AutoScorer(Scorer):
    """`probe` where the cache has the model and that can read a prompt again, else `keydiff`.

    Chosen by what was measured on real weights (`examples/README.md`). `cache.report()` says which of them runs.
    """

    def resolve(self, linked: bool, rereadable: bool) -> Scorer:
        return ProbeScorer() if linked and rereadable else KeyDiffScorer()

    def score(self, states: LayerStates) -> Tensor:
        return KeyDiffScorer().score(states)
