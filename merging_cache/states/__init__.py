"""The records of a fold: what a layer holds, which tokens survive, what is stored, what became of the others.

Plain tensors and nothing else: scorers, budgets and mergers know these records and torch, never transformers.
"""

from .attention import drawn_again, group_logits
from .layer import TILE, Again, LayerStates, ReferenceQueries, Statistics, readers_of
from .slots import ABSENT, DROPPED, Slots, Survivors, count_evicted, gather_tokens, holders_of, top_tokens
from .tally import Tally

__all__ = [
    "ABSENT",
    "DROPPED",
    "TILE",
    "Again",
    "LayerStates",
    "ReferenceQueries",
    "Slots",
    "Statistics",
    "Survivors",
    "Tally",
    "count_evicted",
    "drawn_again",
    "gather_tokens",
    "group_logits",
    "holders_of",
    "readers_of",
    "top_tokens",
]
