"""Scorers made of another scorer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..stage import Spec
from ..states import LayerStates, Statistics
from .base import Scorer, build_scorer


class _OfInner:
    """An attribute that is the other scorer's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, scorer: "WrappingScorer | None", owner: type | None = None) -> Any:
        return self if scorer is None else getattr(scorer.inner, self._name)


@dataclass
class WrappingScorer(Scorer):
    """Changes the scores of another scorer, and asks for all that the other needs to see.

    Args:
        scorer: the other: a name, a dict `{"name": ..., **options}`, a `Scorer` or a function.
    """

    scorer: Spec | Scorer | Callable[[LayerStates], Tensor] = "snapkv"
    inner: Scorer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inner = build_scorer(self.scorer)

    needs_queries = _OfInner()
    query_window = _OfInner()
    needs_hidden_states = _OfInner()
    needs_rotary = _OfInner()
    uses_rotary = _OfInner()
    needs_module = _OfInner()
    reads_again = _OfInner()
    needs_outputs = _OfInner()
    again_tokens = _OfInner()
    chunk_size = _OfInner()
    learns = _OfInner()
    telling_tokens = _OfInner()
    teaching_tokens = _OfInner()
    known = _OfInner()
    learn = _OfInner()
    default_budget = _OfInner()
    recent_share = _OfInner()

    def resolve(self, linked: bool, rereadable: bool) -> Scorer:
        inner = self.inner.resolve(linked, rereadable)
        return self if inner is self.inner else replace(self, scorer=inner)

    def check_model(self, config: Any, layers: Sequence[int]) -> None:
        self.inner.check_model(config, layers)

    def observe(self, states: LayerStates, new: int) -> Statistics | None:
        return self.inner.observe(states, new)

    def observe_again(self, states: LayerStates) -> Statistics:
        return self.inner.observe_again(states)

    def settle(self, statistics: Statistics, folded: Tensor) -> Statistics | None:
        return self.inner.settle(statistics, folded)

    def score(self, states: LayerStates) -> Tensor:
        return self.inner.score(states)
