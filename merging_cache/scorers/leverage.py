"""Tokens whose keys point where few others do."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import solve_positive_definite
from ..stage import option
from ..states import LayerStates
from .base import Scorer, standardized

RIDGE = 0.01
STEP = 2**-19  # of leverages: a token that comes again has the same but for rounding, and should tie with itself


@dataclass
class LeverageScorer(Scorer):
    """Approximate leverage scores of the keys before RoPE (Compactor, arXiv:2507.08143).

    The keys, RoPE taken off and centred, are projected to `sketch_dimension` random directions (Gaussian of variance
    1 / sketch_dimension): X. A token's leverage is `x (X'X + 0.01 I)^-1 x'`. Scores are less their mean and divided by
    their standard deviation over the row's heads and tokens. Leverages are rounded to 2^-19, so that a token that is
    repeated ties with itself although its keys were rotated by other angles.

    Args:
        sketch_dimension: directions to project to.
        seed: of the projection, which is the same in all layers.
    """

    needs_rotary = True

    sketch_dimension: int = option(48, minimum=1)
    seed: int = 0

    def score(self, states: LayerStates) -> Tensor:
        keys = states.rotary.unrotated(states.keys, states.positions)
        generator = torch.Generator().manual_seed(self.seed)
        projection = torch.randn(keys.shape[-1], self.sketch_dimension, generator=generator)
        sketch = (keys - keys.mean(dim=2, keepdim=True)) @ (projection / math.sqrt(self.sketch_dimension)).to(keys)
        gram = sketch.mT @ sketch
        gram.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
        leverage = (sketch * solve_positive_definite(gram, sketch.mT).mT).sum(dim=-1)
        return standardized((leverage.clamp_min(0) / STEP).round() * STEP)
