"""What a budget is: scores in, survivors out."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..states import LayerStates, Survivors


class Budget(ABC):
    """Says how many slots each head keeps, and so which tokens survive."""

    needs_queries: bool = False

    @abstractmethod
    def allocate(self, scores: Tensor, states: LayerStates, num_slots: int) -> Survivors:
        """Choose the survivors.

        Args:
            scores: `[B, H, L]` in fp32, higher is kept, infinite for tokens that must be.
            states: the layer's states, without padding.
            num_slots: slots per head that the layer may keep on average.
        """


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """The ascending indices `[B, H, count]` of the highest scores `[B, H, L]`; of equal ones, the later tokens."""
    from_the_end = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return (scores.shape[-1] - 1 - from_the_end).sort(dim=-1).values
