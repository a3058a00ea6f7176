"""Approximate leverage scores of keys and values."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..stage import option
from ..states import LayerStates
from .base import Scorer

Leverage = Literal["kv_product", "kv_avg", "key", "value"]


@dataclass
class CURScorer(Scorer):
    """`|k|^2 |v|^2`, each relative to its neighbours (CurDKV, arXiv:2509.15038).

    Squared norms stand for the rows' leverage in a CUR decomposition. Each is divided by its sum over the local window
    of `local_window_size` tokens the token lies in; the first `num_sinks` tokens score 1.

    Args:
        num_sinks: tokens at the start that score 1.
        leverage: `"kv_product"`, `"kv_avg"` (their mean), `"key"` or `"value"` alone.
        use_local_approximation: divide by the window's sum.
        local_window_size: tokens in a window.
        use_random_projection: project keys and values to 20 random channels first.
        seed: of that projection.
    """

    num_sinks: int = option(4, minimum=0)
    leverage: Leverage = "kv_product"
    use_local_approximation: bool = True
    local_window_size: int = option(16, minimum=1)
    use_random_projection: bool = False
    seed: int = 0

    def score(self, states: LayerStates) -> Tensor:
        keys, values = self._leverage(states.keys), self._leverage(states.values)
        scores = {"kv_product": keys * values, "kv_avg": (keys + values) / 2, "key": keys, "value": values}[
            self.leverage
        ]
        scores = scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        scores[:, :, : self.num_sinks] = 1.0
        return scores

    def _leverage(self, states: Tensor) -> Tensor:
        """`[B, H, L, D]` to `[B, H, L]`."""
        states = states.float()
        if self.use_random_projection:
            generator = torch.Generator().manual_seed(self.seed)
            projection = torch.randn(states.shape[-1], 20, generator=generator) / math.sqrt(20)
            states = states @ projection.to(states.device)
        squared = states.square().sum(dim=-1)
        if not self.use_local_approximation:
            return squared
        length, window = squared.shape[-1], self.local_window_size
        windows = pad(squared, (0, -length % window)).unflatten(-1, (-1, window))
        share = windows / windows.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return share.flatten(-2)[..., :length]
