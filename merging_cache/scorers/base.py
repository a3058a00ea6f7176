"""What a scorer is: one method from a layer's states to an importance per token."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import Spec, Stage, build_stage
from ..states import LayerStates


class Scorer(Stage, ABC):
    """Gives every token of every KV head an importance; tokens with higher scores keep their slots.

    Subclass it as a dataclass whose fields are its options and define `score`. Rows arrive without padding. Keys and
    values are the cache's own and must not be changed in place; they are in the model's precision, so compute in fp32:
    the norms of bf16 keys tie for three tokens in four.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch
        >>> from merging_cache import LayerStates, Scorer
        >>> @dataclass
        ... class ValueNorm(Scorer):
        ...     '''Keep the tokens with the largest values.'''
        ...     def score(self, states):
        ...         return states.values.float().norm(dim=-1)
        >>> states = LayerStates(keys=torch.randn(1, 2, 5, 8), values=torch.randn(1, 2, 5, 8))
        >>> ValueNorm().score(states).shape
        torch.Size([1, 2, 5])
    """

    default_budget: str = "uniform"
    """The budget that goes with this scorer, by name: what `budget="auto"` is where the cache has the model."""

    recent_share: float = 1.0
    """How much of the slots recent tokens take at most whatever their scores: less for scores that know as much of the
    last tokens as of others."""

    def resolve(self, linked: bool, rereadable: bool) -> "Scorer":
        """The scorer that runs: another one where this one goes by what the cache was given.

        Args:
            linked: whether the cache has the model, and sees its attention.
            rereadable: whether that can read a prompt again.
        """
        return self

    @abstractmethod
    def score(self, states: LayerStates) -> Tensor:
        """The importance of every token, `[B, H, L]`, higher is kept; ties go to the later token."""


@dataclass
class FunctionScorer(Scorer):
    """A plain callable `LayerStates -> [B, H, L]` as a scorer."""

    function: Callable[[LayerStates], Tensor]

    @property
    def stage_name(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))

    def score(self, states: LayerStates) -> Tensor:
        return self.function(states)


SCORERS: dict[str, type[Scorer]] = {}  # by name; the package's `__init__` fills it


def build_scorer(spec: Spec | Scorer | Callable[[LayerStates], Tensor]) -> Scorer:
    """A scorer from its name, its dict, a plain function, or itself."""
    if callable(spec) and not isinstance(spec, (Scorer, type)):
        return FunctionScorer(spec)
    return build_stage("scorer", spec, SCORERS, Scorer)


def remembered(states: LayerStates, *shape: int) -> Tensor:
    """`[B, H, L, *shape]`, a copy of what was kept per token so far: zeros for new tokens, and in the first pass."""
    if states.statistics is not None:
        return states.statistics.tokens.clone()
    return torch.zeros((*states.keys.shape[:3], *shape), device=states.keys.device)


def standardized(scores: Tensor) -> Tensor:
    """`[B, H, L]` less the mean and divided by the standard deviation of each row."""
    rows = scores.flatten(1)
    if rows.shape[1] < 2:
        return torch.zeros_like(scores)
    deviation = rows.std(dim=1).clamp_min(1e-6)
    return (scores - rows.mean(dim=1).view(-1, 1, 1)) / deviation.view(-1, 1, 1)
