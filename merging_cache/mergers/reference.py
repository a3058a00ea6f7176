"""Mergers that weigh what they do by the attention of reference queries."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..stage import Spec, build_stage
from ..states import TILE, LayerStates, Slots, Statistics, Survivors
from .base import Merger, build_merger
from .queries import QUERY_SOURCES, QuerySource, attention_logits, softmax_of_seen


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

    def _wrap(self, spec: Spec | Merger) -> Merger:
        """A merger for this one to call.

        Raises:
            ValueError: if it remembers something of the prompt, which only the merger of the cache can.
        """
        merger = build_merger(spec)
        remembers = type(merger).observe is not Merger.observe or merger.needs_hidden_states
        if remembers and not isinstance(merger, ReferenceMerger):
            raise ValueError(
                f"{merger.stage_name} observes the prompt, which a merger inside {self.stage_name} cannot; give it to "
                "the cache itself"
            )
        return merger

    @property
    def wrapped(self) -> Sequence[Merger]:
        """The mergers that this one calls; those that weigh by reference queries are given its own."""
        return ()

    @property
    def query_window(self) -> int:
        asking = [self.source, *(one for one in self._others if one.needs_queries)]
        return max(one.query_window for one in asking)

    @property
    def uses_rotary(self) -> bool:
        return any(one.uses_rotary for one in (self.source, *self._others))

    @property
    def needs_rotary(self) -> bool:
        return any(one.needs_rotary for one in self._others)

    @property
    def needs_module(self) -> bool:
        return any(one.needs_module for one in self._others)

    @property
    def _others(self) -> list[Merger]:
        return [one for one in self.wrapped if not isinstance(one, ReferenceMerger)]

    def observe(self, states: LayerStates, new: int) -> Statistics | None:
        return self.source.observe(states, new)

    def settle(self, statistics: Statistics, folded: Tensor) -> Statistics:
        return self.source.settle(statistics, folded)

    def prepared(self, states: LayerStates) -> LayerStates:
        asked = states.queries is not None or states.statistics is not None
        if not asked or states.reference is not None:
            return states
        return replace(states, reference=self.source.reference(states))

    def merge(self, states: LayerStates, survivors: Survivors) -> Slots:
        if survivors.indices.shape[2] == states.num_tokens:
            return Slots.of_survivors(states, survivors)
        states = self.prepared(states)
        if states.reference is None:
            raise ValueError(
                f"{self.stage_name} weighs a fold by reference queries, but there are none; give the states `queries` "
                "and `query_positions`, or the cache the model"
            )
        if states.reference.queries.shape[2] == 0:  # nothing to weigh a fold by
            return Slots.of_survivors(states, survivors)
        batch, heads, length = states.positions.shape
        asked = states.reference.queries.shape[1] // heads * states.reference.queries.shape[2]
        step = max(1, 4 * TILE // (batch * asked * length))
        parts = [slice(first, min(first + step, heads)) for first in range(0, heads, step)]
        return Slots.cat([self.merge_heads(states.of_heads(part), survivors.of_heads(part)) for part in parts])

    @abstractmethod
    def merge_heads(self, states: LayerStates, survivors: Survivors) -> Slots:
        """Merge some heads of the layer; `states.reference` holds the queries."""


def full_logits(states: LayerStates) -> Tensor:
    """`[B, H, R, L]` in fp32, the logits of the R reference queries of each head's group over all tokens they see.

    Soft caps and learned sinks of the model's attention are left out.
    """
    return attention_logits(states.reference, states.keys, states.positions, states.logit_scale, states.log_mass)


def full_attention(states: LayerStates) -> Tensor:
    """`[B, H, R, L]` in fp32, the attention of the R reference queries of each head's group to all tokens."""
    known = states.reference.attention
    return softmax_of_seen(full_logits(states), states.reference) if known is None else known


def full_output(states: LayerStates) -> Tensor:
    """`[B, H, R, D]` in fp32, what they read from all tokens."""
    return full_attention(states) @ states.values.float()


def slot_attention(slots: Slots, states: LayerStates) -> Tensor:
    """`[B, H, R, K]` in fp32, their attention to the slots after a fold."""
    logits = attention_logits(states.reference, slots.keys, slots.positions, states.logit_scale, slots.log_mass)
    return softmax_of_seen(logits, states.reference)


def output_error(slots: Slots, states: LayerStates, wanted: Tensor) -> Tensor:
    """`[B, H]`, the squared error of what they read from the slots against `wanted` `[B, H, R, D]`, summed."""
    given = slot_attention(slots, states) @ slots.values.float()
    return (given - wanted).square().sum(dim=(2, 3))
