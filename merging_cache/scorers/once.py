"""Scorers that score each token once, when it passes by, and then remember the score."""

from abc import abstractmethod

import torch
from torch import Tensor

from ..states import LayerStates, Statistics
from .base import Scorer, remembered


class OnceScorer(Scorer):
    """A token keeps the score of its own pass. One that had none (it was generated) gets the mean score of its head."""

    @abstractmethod
    def score_new(self, states: LayerStates, new: int) -> Tensor:
        """The scores `[B, H, new]` of the last `new` tokens, which have just been observed."""

    def observe(self, states: LayerStates, new: int) -> Statistics:
        scored, found = remembered(states), self.score_new(states, new).float()
        # 0 stands for none, and the next number for 0
        scored[:, :, states.num_tokens - new :] = found.masked_fill(found == 0, torch.finfo(found.dtype).tiny)
        return Statistics(tokens=scored)

    def score(self, states: LayerStates) -> Tensor:
        score = states.statistics.tokens
        return mean_where_unknown(score, score != 0)


def mean_where_unknown(scores: Tensor, known: Tensor) -> Tensor:
    """`[B, H, L]` scores, those that are not known replaced by the mean of the known ones of their head."""
    mean = (scores * known).sum(dim=2, keepdim=True) / known.sum(dim=2, keepdim=True).clamp_min(1)
    return torch.where(known, scores, mean)
