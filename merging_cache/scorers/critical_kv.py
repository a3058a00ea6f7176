"""Tokens whose values move the layer's output most."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import option
from ..states import TILE, LayerStates, output_projection, top_tokens
from .wrapper import WrappingScorer


@dataclass
class CriticalKVScorer(WrappingScorer):
    """Two stages: by the other scorer, then also by the output that the values make (CriticalKV, arXiv:2502.03805).

    The first `first_stage_ratio` of the slots goes to the best tokens of the other scorer. The rest goes by
    `(score + epsilon) |v W_O|_1`, W_O being the head's part of the output projection, averaged over the query heads of
    the group. Scores that can be negative are shifted until the lowest of the head is 0, or the product would favour
    small values.

    Args:
        scorer: the other scorer.
        epsilon: added to its scores.
        first_stage_ratio: share of the slots that goes by its scores alone.

    Raises:
        ValueError: when scoring, if the attention module has no output projection that fits.
    """

    needs_module = True

    epsilon: float = option(1e-4, minimum=0)
    first_stage_ratio: float = option(0.5, minimum=0, maximum=1)

    def score(self, states: LayerStates) -> Tensor:
        scores = self.inner.score(states).float()
        slots = states.num_tokens if states.num_slots is None else min(states.num_slots, states.num_tokens)
        first = max(1, int(slots * self.first_stage_ratio)) if self.first_stage_ratio else 0
        raised = scores - scores.amin(dim=-1, keepdim=True).clamp_max(0)
        second = (raised + self.epsilon) * projected_norms(states, 1).mean(dim=2)
        return second.scatter_(2, top_tokens(scores, first), torch.inf)


def projected_norms(states: LayerStates, order: int) -> Tensor:
    """`[B, H, G, L]`, the norm of this order of each value after the part of the output projection of a query head."""
    weight = output_projection(states)  # [H, G, D, hidden]
    if weight is None:
        raise ValueError(
            f"{type(states.module).__name__} has no output projection that takes the values "
            f"{tuple(states.values.shape)} of layer {states.layer_idx}, or one that "
            "cannot be tried out; use another scorer than critical_kv, and kvzip without plus"
        )
    (batch, heads, length), group = states.values.shape[:3], weight.shape[1]
    norms = torch.zeros((batch, heads, group, length), device=states.values.device)
    step = max(1, TILE // (batch * weight.shape[-1]))
    for head in range(heads):
        for start in range(0, length, step):
            values = states.values[:, head, start : start + step].float()
            for number, part in enumerate(weight[head]):
                norms[:, head, number, start : start + step] = torch.linalg.vector_norm(values @ part, order, dim=-1)
    return norms
