"""What a merger is: the layer's states and the survivors in, the slots to store out."""

from abc import ABC, abstractmethod

from ..stage import Spec, Stage, build_stage
from ..states import LayerStates, Slots, Survivors


class Merger(Stage, ABC):
    """Decides what becomes of the evicted tokens."""

    merges_values: bool = True
    """False if values are stored as they came, which is all that multi-head latent attention allows."""

    has_mass: bool = False
    """True if slots draw the attention of all tokens they stand for (`Slots.log_mass`), which needs the model."""

    @property
    def needs_attention(self) -> bool:
        return self.has_mass or super().needs_attention

    def resolve(self, linked: bool) -> "Merger":
        """The merger that runs: another one where this one leaves the choice to what the cache was given.

        Args:
            linked: whether the cache has the model, and sees its attention.
        """
        return self

    def prepared(self, states: LayerStates) -> LayerStates:
        """With what is made for all heads at once, before those that differ are merged one by one."""
        return states

    @abstractmethod
    def merge(self, states: LayerStates, survivors: Survivors) -> Slots:
        """Fold the evicted tokens of `states` into `survivors`. What it returns owns its memory."""


MERGERS: dict[str, type[Merger]] = {}  # by name; the package's `__init__` fills it


def build_merger(spec: Spec | Merger) -> Merger:
    """The merger that a wrapping one names by its name or its dict, or hands over, where the cache has the model."""
    return build_stage("merger", spec, MERGERS, Merger).resolve(linked=True)
