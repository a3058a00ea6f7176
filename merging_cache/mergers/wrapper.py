"""Mergers made of another merger."""

from dataclasses import dataclass, field

from ..stage import Spec, build_stage
from .base import Merger
from .reference import ReferenceMerger


def build_merger(spec: Spec | Merger) -> Merger:
    """A merger from its name, its dict, or itself."""
    from . import MERGERS  # the table that the calling merger is in

    return build_stage("merger", spec, MERGERS, Merger)


@dataclass
class WrappingMerger(ReferenceMerger):
    """Improves on another merger by reference queries, which it hands to it too, if it asks for any.

    Args:
        queries: see `ReferenceMerger`.
        merger: the other: a name, a dict `{"name": ..., **options}` or a `Merger`.
    """

    merger: Spec | Merger = "mass"
    inner: Merger = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inner = build_merger(self.merger)

    @property
    def has_mass(self) -> bool:
        return self.inner.has_mass
