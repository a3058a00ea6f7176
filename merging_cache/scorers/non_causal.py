"""Tokens that their neighbourhood attends to, before and after them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ..stage import option
from ..states import LayerStates, Statistics, group_logits
from .base import Scorer, remembered, standardized
from .once import mean_where_unknown


@dataclass
class NonCausalScorer(Scorer):
    """Attention inside chunks, later tokens' keys included (Compactor, arXiv:2507.08143).

    The sequence is cut into chunks of `chunk_size` positions. Inside each the softmax of `q.k` (without a factor) over
    all its keys is summed over its queries, averaged over the query heads of the group and multiplied by `|v|`; then
    the mean of 3 neighbours, less the mean and divided by the standard deviation over the row's heads and tokens. A
    chunk that comes in several passes is judged anew with each, by what is stored of it; tokens of no such chunk (they
    were generated) count as the mean of their head.

    Args:
        chunk_size: positions in a chunk.
    """

    needs_queries = True

    chunk_size: int = option(256, minimum=1)

    @property
    def query_window(self) -> int:
        return self.chunk_size - 1

    def observe(self, states: LayerStates, new: int) -> Statistics:
        received = remembered(states)
        positions = states.query_positions[0]  # rows are alike
        for chunk in torch.unique(positions[len(positions) - new :] // self.chunk_size).tolist():
            self._attend(states, received, chunk)
        return Statistics(tokens=received)

    def _attend(self, states: LayerStates, received: Tensor, chunk: int) -> None:
        """Write the attention inside one chunk over `received`."""
        asked = states.query_positions[0] // self.chunk_size == chunk
        inside = states.positions // self.chunk_size == chunk
        columns = inside.flatten(0, 1).any(dim=0).nonzero().squeeze(1)
        if not len(columns):
            return
        inside = inside[:, :, columns]
        queries = states.queries[:, :, asked].float().unflatten(1, (states.keys.shape[1], -1))
        logits = group_logits(queries, states.keys[:, :, columns].float())
        least = torch.finfo(logits.dtype).min
        weights = logits.masked_fill_(~inside[:, :, None, None], least).softmax(dim=-1)
        received[:, :, columns] = torch.where(inside, weights.sum(dim=3).mean(dim=2), received[:, :, columns])

    def score(self, states: LayerStates) -> Tensor:
        received = mean_where_unknown(states.statistics.tokens, states.statistics.tokens > 0)
        scores = received * states.values.float().norm(dim=-1)
        return standardized(avg_pool1d(scores, kernel_size=3, padding=1, stride=1))
