"""What a merger is: the layer's states and the survivors in, the slots to store out."""

from abc import ABC, abstractmethod

from ..states import LayerStates, Slots, Survivors


class Merger(ABC):
    """Decides what becomes of the evicted tokens."""

    needs_queries: bool = False
    merges_values: bool = True
    """False if values are stored as they came, which is all that multi-head latent attention allows."""

    @abstractmethod
    def merge(self, states: LayerStates, survivors: Survivors) -> Slots:
        """Fold the evicted tokens of `states` (without padding) into `survivors`. What it returns owns its memory."""
