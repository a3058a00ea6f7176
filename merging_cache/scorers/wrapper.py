"""Scorers made of another scorer."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..stage import Spec
from ..states import LayerStates, Statistics
from .base import Scorer, build_scorer


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

    @property
    def needs_queries(self) -> bool:
        return self.inner.needs_queries

    @property
    def query_window(self) -> int:
        return self.inner.query_window

    @property
    def needs_hidden_states(self) -> bool:
        return self.inner.needs_hidden_states

    @property
    def needs_rotary(self) -> bool:
        return self.inner.needs_rotary

    @property
    def needs_module(self) -> bool:
        return self.inner.needs_module

    @property
    def reads_again(self) -> bool:
        return self.inner.reads_again

    @property
    def chunk_size(self) -> int:
        return self.inner.chunk_size

    @property
    def default_budget(self) -> str:
        return self.inner.default_budget

    def observe(self, states: LayerStates, new: int) -> Statistics | None:
        return self.inner.observe(states, new)

    def observe_again(self, states: LayerStates) -> Statistics:
        return self.inner.observe_again(states)

    def settle(self, statistics: Statistics, folded: Tensor) -> Statistics | None:
        return self.inner.settle(statistics, folded)

    def score(self, states: LayerStates) -> Tensor:
        return self.inner.score(states)
