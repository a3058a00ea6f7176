"""Tokens that the model looks at when it reads the context once more."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import option
from ..states import LayerStates, Statistics
from .base import Scorer, remembered
from .critical_kv import projected_norms


@dataclass
class KVzipScorer(Scorer):
    """The largest attention that a token draws while the model reads the context again (KVzip, arXiv:2505.23416).

    After the prompt, and before anything is generated, the cache has the model read its tokens once more behind it, in
    chunks that see all of the context and themselves. No instruction stands in front of them. The score is the maximum
    over the tokens read again and the query heads of the group, of the softmax over the context and the chunk. That
    takes two to three times as long as the prompt itself. In later turns only what came since is read again; earlier
    tokens keep the larger of both scores. Recent tokens are kept by their scores, but for a sixteenth of the slots.

    Args:
        chunk_size: tokens that are read again at a time: with more of them it takes more memory and less time.
        plus: weigh the attention by what it adds to the output: by the length of the value after its part of the output
            projection, over that of the attention's input where the token is read again (KVzip+, arXiv:2601.07891).

    Raises:
        ValueError: when scoring with `plus`, if the attention module has no output projection that fits.
    """

    reads_again = True
    default_budget = "global"
    recent_share = 1 / 16  # the last tokens are read again like all others

    chunk_size: int = option(2048, minimum=1)
    plus: bool = False

    @property
    def needs_hidden_states(self) -> bool:
        return self.plus

    @property
    def needs_module(self) -> bool:
        return self.plus

    def observe_again(self, states: LayerStates) -> Statistics:
        weights = states.again.weights
        if not self.plus:
            drawn = weights.flatten(2, 3).amax(dim=2).float()
            return Statistics(tokens=torch.maximum(drawn, remembered(states)))
        drawn = (weights.float() / states.again.norms[:, None, None, :, None]).amax(dim=3)
        drawn = drawn.movedim(2, 3)  # [B, H, L, G], since what is kept is kept for each token
        return Statistics(tokens=torch.maximum(drawn, remembered(states, drawn.shape[3])))

    def score(self, states: LayerStates) -> Tensor:
        drawn = states.statistics.tokens
        return (drawn.movedim(3, 2) * projected_norms(states, 2)).amax(dim=2) if self.plus else drawn
