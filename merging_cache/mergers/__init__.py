"""Mergers: what becomes of evicted tokens. `MERGERS` is the table of their names."""

from .base import Merger
from .count import CountMerger
from .drop import DropMerger
from .mass import MassMerger
from .queries import QUERY_SOURCES, QuerySource
from .similarity import SimilarityMerger

MERGERS: dict[str, type[Merger]] = {
    "count": CountMerger,
    "drop": DropMerger,
    "mass": MassMerger,
    "similarity": SimilarityMerger,
}

__all__ = [
    "MERGERS",
    "QUERY_SOURCES",
    "CountMerger",
    "DropMerger",
    "MassMerger",
    "Merger",
    "QuerySource",
    "SimilarityMerger",
]
