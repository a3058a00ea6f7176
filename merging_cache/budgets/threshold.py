"""As many slots as there are important tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import option
from ..states import LayerStates, Survivors, top_tokens
from .base import Budget


@dataclass
class ThresholdBudget(Budget):
    """Tokens that score below a threshold lose their slot, however many they are (DMS, arXiv:2506.05345).

    There is no top-k: how much is kept follows from the scores, and `compression_ratio` and `max_tokens` say nothing
    (but a ratio of 0 still folds nothing, and sinks and recent tokens are clipped to the slots that they allow). The
    last `window` tokens always stay, and so do sinks, recent tokens and the best token of every head. Meant for scorers
    with an absolute scale, such as `kvzap` and `fast_kvzip`.

    Args:
        threshold: what scores less than this is evicted.
        window: the last tokens that are not.

    Raises:
        ValueError: if `window` is negative.
    """

    ragged = True

    threshold: float = 0.0
    window: int = option(128, minimum=0)

    def may_fold(self, seen: int, num_slots: int) -> bool:
        return seen > max(1, self.window)

    def folds(self, num_tokens: int, seen: int, layer_slots: int) -> bool:
        return num_tokens > max(1, self.window)

    def allocate(self, scores: Tensor, states: LayerStates, num_slots: int) -> Survivors:
        length = states.num_tokens
        recent = torch.arange(length, device=scores.device) >= length - self.window
        best = Survivors(top_tokens(scores, 1)).mask(length)
        kept = (scores >= self.threshold) | recent | best
        return Survivors.of_mask(kept if states.valid is None else kept & states.valid)
