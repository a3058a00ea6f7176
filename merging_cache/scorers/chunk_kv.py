"""Whole chunks of tokens instead of single ones."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..stage import option
from ..states import LayerStates
from .wrapper import WrappingScorer


@dataclass
class ChunkKVScorer(WrappingScorer):
    """The mean score of the token's chunk, summed over heads (ChunkKV, arXiv:2502.00299).

    The stored tokens of each row are cut into chunks of `chunk_length`. All tokens of a chunk score the same, in all
    heads; the chunk at which the slots run out keeps its last tokens.

    Args:
        scorer: whose scores are averaged.
        chunk_length: tokens in a chunk.
    """

    chunk_length: int = option(20, minimum=1)

    def score(self, states: LayerStates) -> Tensor:
        # infinite scores stand for tokens that must stay; a sum of them would not tell one chunk from another
        scores = self.inner.score(states).float().clamp(-1e30, 1e30).sum(dim=1)
        length = scores.shape[1]
        missing = -length % self.chunk_length
        chunks = pad(scores, (0, missing)).unflatten(1, (-1, self.chunk_length)).sum(dim=2)
        counts = torch.full_like(chunks, self.chunk_length)
        counts[:, -1] -= missing
        spread = (chunks / counts).repeat_interleave(self.chunk_length, dim=1)[:, :length]
        return spread.unsqueeze(1).expand(states.keys.shape[:3])
