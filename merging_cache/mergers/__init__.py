"""Mergers: what becomes of evicted tokens. `MERGERS` is the table of their names."""

from .base import Merger
from .drop import DropMerger
from .similarity import SimilarityMerger

MERGERS: dict[str, type[Merger]] = {"drop": DropMerger, "similarity": SimilarityMerger}

__all__ = ["MERGERS", "DropMerger", "Merger", "SimilarityMerger"]
