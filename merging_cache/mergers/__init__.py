"""Mergers: what becomes of evicted tokens. `MERGERS` is the table of their names."""

from .auto import AutoMerger
from .base import MERGERS, Merger
from .cam import CAMMerger
from .count import CountMerger
from .drop import DropMerger
from .mass import MassMerger
from .queries import QUERY_SOURCES, QuerySource
from .refit import RefitMerger
from .residual import ResidualMerger
from .similarity import SimilarityMerger
from .validated import ValidatedMerger

MERGERS |= {
    "auto": AutoMerger,
    "cam": CAMMerger,
    "count": CountMerger,
    "drop": DropMerger,
    "mass": MassMerger,
    "refit": RefitMerger,
    "residual": ResidualMerger,
    "similarity": SimilarityMerger,
    "validated": ValidatedMerger,
}

__all__ = [
    "MERGERS",
    "QUERY_SOURCES",
    "AutoMerger",
    "CAMMerger",
    "CountMerger",
    "DropMerger",
    "MassMerger",
    "Merger",
    "QuerySource",
    "RefitMerger",
    "ResidualMerger",
    "SimilarityMerger",
    "ValidatedMerger",
]
