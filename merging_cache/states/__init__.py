"""The records of a fold: what a layer holds, which tokens survive, what is stored, what became of the others.

Plain tensors and nothing else: scorers, budgets and mergers know these records and torch, never transformers.
"""

from .attention import group_logits
from .layer import TILE, Again, LayerStates, ReferenceQueries, Statistics, readers_of, rows_of
from .projection import Projected, changes_left_out, output_projection
from .slots import ABSENT, DROPPED, Slots, Survivors, count_evicted, gather_tokens, holders_of, top_tokens
from .tally import Tally

__all__ = [
    "ABSENT",
    "DROPPED",
    "TILE",
    "Again",
    "LayerStates",
    "Projected",
    "ReferenceQueries",
    "Slots",
    "Statistics",
    "Survivors",
    "Tally",
    "changes_left_out",
    "count_evicted",
    "gather_tokens",
    "group_logits",
    "holders_of",
    "output_projection",
    "readers_of",
    "rows_of",
    "top_tokens",
]
