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
        scored = remembered(states, 2)  # score, whether there is one
        first = states.num_tokens - new
        scored[:, :, first:, 0], scored[:, :, first:, 1] = self.score_new(states, new).float(), 1.0
        return Statistics(tokens=scored)

    def score(self, states: LayerStates) -> Tensor:
        score, known = states.statistics.tokens.unbind(dim=-1)
        return mean_where_unknown(score, known > 0)


def mean_where_unknown(scores: Tensor, known: Tensor) -> Tensor:
    """`[B, H, L]` scores, those that are not known replaced by the mean of the known ones of their head."""
    mean = (scores * known).sum(dim=2, keepdim=True) / known.sum(dim=2, keepdim=True).clamp_min(1)
    return torch.where(known, scores, mean)
