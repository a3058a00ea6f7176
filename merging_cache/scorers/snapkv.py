"""Tokens that the end of the prompt attends to."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ..stage import option
from ..states import LayerStates
from .attention import attention_tiles
from .base import Scorer


@dataclass
class SnapKVScorer(Scorer):
    """Mean attention of the last queries, smoothed along the sequence (SnapKV, arXiv:2404.14469).

    For each of the last `window_size` queries the causal softmax over all tokens; its mean over these queries and the
    query heads of the group, averaged over `kernel_size` neighbours before the window. The window's own tokens score 1,
    more than any other. Where the prompt is no longer than the window, all its queries are asked and no token is set
    apart.

    Args:
        window_size: how many of the last queries are asked.
        kernel_size: width of the smoothing, odd; 1 for none.

    Raises:
        ValueError: if an option is out of its range.
    """

    needs_queries = True

    window_size: int = option(64, minimum=1)
    kernel_size: int = option(5, minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {self.kernel_size}; it must be odd")

    @property
    def query_window(self) -> int:
        return self.window_size

    def score(self, states: LayerStates) -> Tensor:
        attention = torch.zeros(states.keys.shape[:3], device=states.keys.device)
        asked = min(self.window_size, states.queries.shape[2])
        for _, weights in attention_tiles(states, last=asked):
            attention += weights.sum(dim=(2, 3))
        attention /= asked * states.group_size
        if asked >= states.seen:
            return avg_pool1d(attention, self.kernel_size, padding=self.kernel_size // 2, stride=1)
        window = states.positions >= states.query_positions[:, None, -asked, None]
        smooth = avg_pool1d(
            attention.masked_fill(window, 0.0), self.kernel_size, padding=self.kernel_size // 2, stride=1
        )
        return smooth.masked_fill(window, 1.0)  # more than any mean of attention outside
