"""Tokens that vary most against the block that follows them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import option
from ..states import LayerStates
from .base import Scorer


@dataclass
class LagKVScorer(Scorer):
    """The spread of a token's channels, normalised by the range of the next block (LagKV, arXiv:2504.04704).

    After `n_sink` tokens the sequence is cut into blocks of `lag_size`. For a token x of a block, with the minimum and
    maximum of each channel taken over the next block: `softmax_block(std_channels((x - min) / (max - min)))`, averaged
    over keys and values, then replaced by its rank in the block divided by `lag_size`. Sinks, the last whole block and
    what follows it score 1. With fewer than `n_sink + 2 * lag_size` tokens there is nothing to compare with, and
    tokens are scored by recency.

    Args:
        n_sink: tokens at the start that always score 1.
        lag_size: tokens in a block.
        cross_block: compare the softmax scores themselves over all blocks instead of the rank within each.
    """

    n_sink: int = option(4, minimum=0)
    lag_size: int = option(128, minimum=1)
    cross_block: bool = False

    def score(self, states: LayerStates) -> Tensor:
        length = states.num_tokens
        scores = torch.ones(states.keys.shape[:3], device=states.keys.device)
        after_sinks = max(0, length - self.n_sink)
        blocks = after_sinks // self.lag_size
        if blocks < 2:
            recency = torch.arange(after_sinks, device=scores.device) / max(1, after_sinks)
            scores[:, :, length - after_sinks :] = recency
            return scores
        end = self.n_sink + blocks * self.lag_size
        spread = (
            self._spread(states.keys[:, :, self.n_sink : end]) + self._spread(states.values[:, :, self.n_sink : end])
        ) / 2
        if not self.cross_block:
            spread = spread.argsort(dim=-1, stable=True).argsort(dim=-1) / self.lag_size
        scores[:, :, self.n_sink : end - self.lag_size] = spread.flatten(2)
        return scores

    def _spread(self, states: Tensor) -> Tensor:
        """`[B, H, blocks * lag_size, D]` to `[B, H, blocks - 1, lag_size]`."""
        blocks = states.float().unflatten(2, (-1, self.lag_size))
        following = blocks[:, :, 1:]
        low, high = following.amin(dim=3, keepdim=True), following.amax(dim=3, keepdim=True)
        # a channel that does not vary in the next block says nothing about this one
        scaled = (blocks[:, :, :-1] - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        return scaled.clamp(-1e18, 1e18).std(dim=-1).softmax(dim=-1)
