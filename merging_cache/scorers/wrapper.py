"""Scorers made of another scorer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..stage import Spec
from ..states import LayerStates, Statistics
from .base import Scorer, build_scorer


def _of_inner(name: str) -> Any:
    """An attribute that is the other scorer's."""
    return property(lambda self: getattr(self.inner, name))


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

    needs_queries = _of_inner("needs_queries")
    query_window = _of_inner("query_window")
    needs_hidden_states = _of_inner("needs_hidden_states")
    needs_rotary = _of_inner("needs_rotary")
    uses_rotary = _of_inner("uses_rotary")
    needs_module = _of_inner("needs_module")
    reads_again = _of_inner("reads_again")
    needs_outputs = _of_inner("needs_outputs")
    again_tokens = _of_inner("again_tokens")
    chunk_size = _of_inner("chunk_size")
    default_budget = _of_inner("default_budget")
    recent_share = _of_inner("recent_share")

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
