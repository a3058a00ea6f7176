"""SnapKV with more slots for lower layers."""

from dataclasses import dataclass

from .snapkv import SnapKVScorer


@dataclass
class PyramidKVScorer(SnapKVScorer):
    """`SnapKVScorer` that comes with the budget `"pyramid"` (PyramidKV, arXiv:2406.02069).

    Args:
        window_size, kernel_size: as for `SnapKVScorer`.
    """

    default_budget = "pyramid"
