"""What a budget is: scores in, survivors out."""

from abc import ABC, abstractmethod

from torch import Tensor

from ..stage import Stage
from ..states import LayerStates, Survivors


class Budget(Stage, ABC):
    """Says how many slots each layer and head keep, and so which tokens survive."""

    ragged: bool = False
    """True if layers or heads may end up with different numbers of slots, which needs the model (its masks have to fit
    every layer): `MergingDynamicCache(model=model, ...)`."""

    over_layers: bool = False
    """True if slots are shared by all layers of a cache, which then fold together: see `GlobalBudget.share`."""

    @property
    def needs_attention(self) -> bool:
        return self.ragged or super().needs_attention

    def resolve(self, linked: bool, rereadable: bool, own: str) -> "Budget":
        """The budget that runs: another one where this goes by what the cache was given.

        Args:
            linked: whether the cache has the model, and sees its attention.
            rereadable: whether that can read a prompt again.
            own: the name of the scorer's own budget.
        """
        return self

    def layer_slots(self, num_slots: int, seen: int, layer_rank: tuple[int, int] | None) -> int:
        """How many slots per head a layer keeps on average, if all layers together keep `num_slots`.

        Args:
            num_slots: slots per head, averaged over layers and heads.
            seen: tokens seen, the most that a layer can keep.
            layer_rank: `(i, n)` for folding layer i of n.
        """
        return num_slots

    def may_fold(self, seen: int, num_slots: int) -> bool:
        """Whether any layer is to be folded after `seen` tokens, all layers together to `num_slots` per head."""
        return num_slots < seen

    def folds(self, num_tokens: int, seen: int, layer_slots: int) -> bool:
        """Whether then a layer that stores `num_tokens` of `seen` tokens is to be folded to `layer_slots`."""
        return layer_slots < num_tokens

    @abstractmethod
    def allocate(self, scores: Tensor, states: LayerStates, num_slots: int) -> Survivors:
        """Choose the survivors.

        Args:
            scores: `[B, H, L]` in fp32, higher is kept; infinite for tokens that must be, and `-inf` where a head has
                no such token (see `states.valid`), which must not be.
            states: the layer's states, without padding.
            num_slots: slots per head that the layer may keep on average.
        """
