"""Any tokens: the baseline every scorer has to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..states import LayerStates
from .base import Scorer


@dataclass
class RandomScorer(Scorer):
    """Uniform random scores.

    Args:
        seed: with a seed, a layer of a given length always gets the same scores, in every row of any batch and on any
            device; without (`None`), torch's global generator is used.
    """

    seed: int | None = None

    def score(self, states: LayerStates) -> Tensor:
        batch, heads, length = states.keys.shape[:3]
        if self.seed is None:
            return torch.rand(batch, heads, length, device=states.keys.device)
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * ((states.layer_idx or 0) + 1))
        one_row = torch.rand(states.num_heads or heads, length, generator=generator)
        one_row = one_row if states.heads is None else one_row[states.heads.cpu()]
        return one_row.to(states.keys.device).expand(batch, heads, length)
