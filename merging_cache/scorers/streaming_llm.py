"""The first tokens and the most recent ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import option
from ..states import LayerStates
from .base import Scorer


@dataclass
class StreamingLLMScorer(Scorer):
    """1 for the first `n_sink` tokens, then rising towards 1 with recency (StreamingLLM, arXiv:2309.17453).

    What survives is the sinks and the latest tokens, whatever the budget.
    """

    n_sink: int = option(4, minimum=0)

    def score(self, states: LayerStates) -> Tensor:
        index = torch.arange(states.num_tokens, device=states.keys.device)
        recency = (index + 1.0) / states.num_tokens
        return recency.masked_fill(index < self.n_sink, 1.0).expand(states.keys.shape[:3])
