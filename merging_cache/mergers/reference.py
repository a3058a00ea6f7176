"""Mergers that weigh what they do by the attention of reference queries."""

from abc import abstractmethod
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..stage import Spec, build_stage
from ..states import TILE, LayerStates, Slots, Statistics, Survivors
from .base import Merger
from .queries import QUERY_SOURCES, QuerySource, attention_weights


@dataclass
class ReferenceMerger(Merger):
    """Asks reference queries; heads are merged a few at a time, so that their attention is never held for all.

    Args:
        queries: where the reference queries come from: `"stratified"`, `"last"`, a dict or a `QuerySource`.
    """

    needs_queries = True

    queries: Spec | QuerySource = "stratified"
    source: QuerySource = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source = build_stage("queries", self.queries, QUERY_SOURCES, QuerySource)

    @property
    def query_window(self) -> int:
        return self.source.query_window

    @property
    def uses_rotary(self) -> bool:
        return self.source.uses_rotary

    def observe(self, states: LayerStates, new: int) -> Statistics | None:
        return self.source.observe(states, new)

    def settle(self, statistics: Statistics, folded: Tensor) -> Statistics:
        return self.source.settle(statistics, folded)

    def merge(self, states: LayerStates, survivors: Survivors) -> Slots:
        if survivors.indices.shape[2] == states.num_tokens:
            return Slots.of_survivors(states, survivors)
        if states.reference is None:
            states = replace(states, reference=self.source.reference(states))
        batch, heads, length = states.positions.shape
        asked = states.reference.queries.shape[1] // heads * states.reference.queries.shape[2]
        step = max(1, 4 * TILE // (batch * asked * length))
        parts = [slice(first, min(first + step, heads)) for first in range(0, heads, step)]
        return Slots.cat([self.merge_heads(states.of_heads(part), survivors.of_heads(part)) for part in parts])

    @abstractmethod
    def merge_heads(self, states: LayerStates, survivors: Survivors) -> Slots:
        """Merge some heads of the layer; `states.reference` holds the queries."""


def full_attention(states: LayerStates) -> Tensor:
    """`[B, H, R, L]` in fp32, the attention of the R reference queries of each head's group to all tokens."""
    return attention_weights(states.reference, states.keys, states.positions, states.logit_scale, states.log_mass)


def full_output(states: LayerStates) -> Tensor:
    """`[B, H, R, D]` in fp32, what they read from all tokens."""
    return full_attention(states) @ states.values.float()


def slot_attention(slots: Slots, states: LayerStates) -> Tensor:
    """`[B, H, R, K]` in fp32, their attention to the slots after a fold."""
    return attention_weights(states.reference, slots.keys, slots.positions, states.logit_scale, slots.log_mass)


def output_error(slots: Slots, states: LayerStates, wanted: Tensor) -> Tensor:
    """`[B, H]`, the squared error of what they read from the slots against `wanted` `[B, H, R, D]`, summed."""
    given = slot_attention(slots, states) @ slots.values.float()
    return (given - wanted).square().sum(dim=(2, 3))
