"""What a scorer is: one method from a layer's states to an importance per token."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..states import LayerStates


class Scorer(ABC):
    """Gives every token of every KV head an importance; tokens with higher scores keep their slots.

    Subclass it as a dataclass whose fields are its options and define `score`. Rows arrive without padding; keys and
    values are in the model's precision, so compute in fp32: the norms of bf16 keys tie for three tokens in four.

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

    needs_queries: bool = False
    """True if `score` reads `states.queries`."""

    @abstractmethod
    def score(self, states: LayerStates) -> Tensor:
        """The importance of every token, `[B, H, L]`, higher is kept; ties go to the later token."""


@dataclass
class FunctionScorer(Scorer):
    """A plain callable `LayerStates -> [B, H, L]` as a scorer."""

    function: Callable[[LayerStates], Tensor]

    def score(self, states: LayerStates) -> Tensor:
        return self.function(states)
