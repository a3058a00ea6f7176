"""Values refitted until the folded cache answers as the full one does."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..linalg import solve_positive_definite
from ..stage import Spec, option
from ..states import LayerStates, Slots, Survivors
from .base import Merger
from .reference import ReferenceMerger, full_attention, full_output, slot_attention


@dataclass
class RefitMerger(ReferenceMerger):
    """Ridge regression of the slots' values on the full cache's outputs, anchored at another merger's (GRKV,
    arXiv:2605.31105).

    With X `[R, K]` the attention of the R reference queries to the slots that the other merger made, V their values
    and Y `[R, D]` the outputs of the full cache: `V <- V + X' (X X' + ridge I)^-1 (Y - X V)`, a system of the size of
    R. Sinks, recent tokens and the slots that draw most attention stay as they are. The change is scaled down to
    `max_change` of the values' norm; a head whose error on the reference queries does not fall keeps its values. Works
    without mass as well, for `merger="drop"` or `"similarity"`.

    Args:
        queries: see `ReferenceMerger`.
        merger: the merger to improve on: a name, a dict or a `Merger`; by default `mass` with a `lookup_share` of 0.002
            and a `similarity_threshold` of 0.5. It is given the same reference queries.
        ridge: weight of the penalty on changes, the rows of X summing to 1.
        max_change: the largest change, relative to the norm of all values of the head.
        guarded: the share of slots, those with the most attention, that stay as they are.

    Raises:
        ValueError: if an option is out of its range.
    """

    merger: Spec | Merger = field(
        default_factory=lambda: {"name": "mass", "lookup_share": 0.002, "similarity_threshold": 0.5}
    )
    inner: Merger = field(init=False, repr=False, compare=False)
    ridge: float = option(0.1, minimum=1e-6)
    max_change: float = option(0.25, minimum=0)
    guarded: float = option(0.1, minimum=0, maximum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inner = self._wrap(self.merger)

    @property
    def wrapped(self) -> Sequence[Merger]:
        return (self.inner,)

    @property
    def has_mass(self) -> bool:
        return self.inner.has_mass

    def merge_heads(self, states: LayerStates, survivors: Survivors) -> Slots:
        # once for both mergers
        states = replace(states, reference=replace(states.reference, attention=full_attention(states)))
        slots = self.inner.merge(states, survivors)
        if slots.log_mass is not None:  # as attention will see it
            slots = replace(slots, log_mass=slots.log_mass.to(states.keys.dtype).float())
        attention = slot_attention(slots, states)  # [B, H, R, K]
        wanted, values = full_output(states), slots.values.float()
        missing = wanted - attention @ values
        free = attention * self._free(slots, states, survivors, attention).unsqueeze(2)
        gram = free @ free.mT
        gram.diagonal(dim1=-2, dim2=-1).add_(self.ridge)
        change = free.mT @ solve_positive_definite(gram, missing)
        size = change.norm(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(change.dtype).tiny)
        allowed = self.max_change * values.norm(dim=(2, 3), keepdim=True)
        refitted = (values + change * (allowed / size).clamp_max(1.0)).to(slots.values.dtype)
        better = _squared(wanted - attention @ refitted.float()) < _squared(missing)
        return replace(slots, values=torch.where(better, refitted, slots.values))

    def _free(self, slots: Slots, states: LayerStates, survivors: Survivors, attention: Tensor) -> Tensor:
        """`[B, H, K]` bool, the slots whose values may change."""
        drawn = attention.sum(dim=2)
        guarded = int(self.guarded * drawn.shape[2])
        most = drawn.argsort(dim=-1, descending=True, stable=True)[..., :guarded]
        free = torch.ones_like(drawn, dtype=torch.bool).scatter_(2, most, False)
        if survivors.protected is not None:
            protected = torch.zeros_like(states.positions, dtype=torch.bool)
            protected = protected.scatter(2, survivors.indices, survivors.protected)
            free &= ~protected.gather(2, survivors.indices if slots.tokens is None else slots.tokens)
        return free


def _squared(error: Tensor) -> Tensor:
    """`[B, H, R, D]` to `[B, H, 1, 1]`."""
    return error.square().sum(dim=(2, 3), keepdim=True)
