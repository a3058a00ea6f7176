"""Outlying keys and attended keys together."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..stage import option
from ..states import LayerStates, Statistics
from .base import Scorer
from .leverage import LeverageScorer
from .non_causal import NonCausalScorer


@dataclass
class CompactorScorer(Scorer):
    """`blending * leverage + non_causal`, both over the tokens between the sinks (Compactor, arXiv:2507.08143).

    The first `sink_size_start` and the last `sink_size_end` tokens score highest.

    Args:
        sink_size_start, sink_size_end: first and last tokens that are always kept.
        chunk_size: see `non_causal`.
        sketch_dimension: see `leverage`.
        blending: the weight of the leverage; by default the share of the tokens seen that loses its slot.
        seed: of the leverage's projection.
    """

    needs_queries = True
    needs_rotary = True

    sink_size_start: int = option(8, minimum=0)
    sink_size_end: int = option(4, minimum=0)
    chunk_size: int = option(256, minimum=1)
    sketch_dimension: int = option(48, minimum=1)
    blending: float | None = None
    seed: int = 0

    @property
    def query_window(self) -> int:
        return self._non_causal.query_window

    @property
    def _non_causal(self) -> NonCausalScorer:
        return NonCausalScorer(self.chunk_size)

    def observe(self, states: LayerStates, new: int) -> Statistics:
        return self._non_causal.observe(states, new)

    def score(self, states: LayerStates) -> Tensor:
        length = states.num_tokens
        start = min(self.sink_size_start, length)
        end = max(start, length - self.sink_size_end)
        scores = torch.full(states.keys.shape[:3], torch.inf, device=states.keys.device)
        if start == end:
            return scores
        blending = self.blending
        if blending is None:
            blending = 0.35 if states.num_slots is None else max(0.0, 1 - states.num_slots / states.seen)
        index = torch.arange(start, end, device=states.keys.device)
        between = replace(states, queries=None, query_positions=None, hidden_states=None)
        between = between.select(torch.arange(states.keys.shape[0], device=index.device), index)
        leverage = LeverageScorer(self.sketch_dimension, self.seed).score(between)
        scores[:, :, start:end] = blending * leverage + self._non_causal.score(between)
        return scores
