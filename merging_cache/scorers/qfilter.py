"""Tokens that lie along the direction of the queries."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..states import LayerStates, Statistics
from .base import Scorer
from .weights import Weights


@dataclass
class QFilterScorer(Scorer):
    """`-k.f`, f the direction opposite to the one that a head's queries share (Q-Filters, arXiv:2503.02812).

    Without `weights`, f is computed from the prompt: the first right singular vector of the queries of all query heads
    of the group, with the sign that makes the mean query's part along it negative.

    Args:
        weights: file, folder or hub name of published filters: one tensor `q_filters` `[layers, H, D]`.
    """

    query_window = 0

    weights: str | None = None
    _weights: Weights | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.weights = None if self.weights is None else str(self.weights)  # a path will do
        super().__post_init__()
        self._weights = None if self.weights is None else Weights(self.weights)

    @property
    def needs_queries(self) -> bool:
        return self.weights is None

    def observe(self, states: LayerStates, new: int) -> Statistics | None:
        if self.weights is not None:
            return None
        queries = states.queries[:, :, states.queries.shape[2] - new :].float()
        total, outer = queries.sum(dim=2), queries.mT @ queries
        if states.statistics is not None:
            total, outer = total + states.statistics.queries[0], outer + states.statistics.queries[1]
        return Statistics(queries=(total, outer))

    def score(self, states: LayerStates) -> Tensor:
        if self.weights is not None:
            direction = self._of_layer(states).to(states.keys.device).float().unsqueeze(0)
        else:
            heads = states.keys.shape[1]
            total, outer = (part.unflatten(1, (heads, -1)).sum(dim=2) for part in states.statistics.queries)
            direction = torch.linalg.eigh(outer).eigenvectors[..., -1]
            along = (direction * total).sum(dim=-1, keepdim=True)
            direction = torch.where(along > 0, -direction, direction)
        return -(states.keys.float() * direction.unsqueeze(2)).sum(dim=-1)

    def _of_layer(self, states: LayerStates) -> Tensor:
        """`[H, D]`, the published directions of these heads."""
        tensors = self._weights.tensors
        if "q_filters" not in tensors or tensors["q_filters"].dim() != 3:
            raise ValueError(
                f"{self.weights} holds {sorted(tensors)}; Q-filters are one tensor `q_filters` [layers, H, D]"
            )
        all_filters = tensors["q_filters"]
        filters = all_filters[states.layer_idx] if states.layer_idx < len(all_filters) else all_filters[:0]
        if states.heads is not None:
            filters = filters[states.heads.cpu()]
        if filters.shape != (states.keys.shape[1], states.keys.shape[3]):
            raise ValueError(
                f"{self.weights} holds filters {tuple(all_filters.shape)} [layers, H, D], which do not fit layer "
                f"{states.layer_idx} with keys {tuple(states.keys.shape)}; are they another model's?"
            )
        return filters
