"""What became of the tokens that a layer evicted, added up over its folds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .slots import ABSENT, DROPPED, Slots


@dataclass(frozen=True)
class Tally:
    """Counts of one layer's evicted tokens, and where they are held.

    Args:
        num_merged, num_dropped: `[B, H]`, tokens evicted so far that were folded into a survivor, and that were not.
        holders: `[B, H, P]`, where the cache traces, for every position of a row before the last fold (padding not
            counted) that of the slot that holds its token now: its own for survivors, else `DROPPED` or `ABSENT`.
    """

    num_merged: Tensor
    num_dropped: Tensor
    holders: Tensor | None = None

    @classmethod
    def after(cls, before: "Tally | None", slots: Slots) -> "Tally":
        """The tally after a fold that left these slots."""
        merged, dropped, holders = slots.num_merged, slots.num_dropped, slots.holders
        if before is not None:
            merged, total = before.num_merged + merged, before.num_merged + before.num_dropped + merged + dropped
            merged = merged.clamp_min(0)  # what a dropped slot stood for is known by its mass, which may be estimated
            dropped = total - merged
        if holders is not None:
            holders = handed_on(None if before is None else before.holders, holders)
        return cls(merged, dropped, holders)

    def select_rows(self, indices: Tensor) -> "Tally":
        """Make row `indices[i]` of the batch row i."""
        parts = (self.num_merged, self.num_dropped, self.holders)
        return Tally(*(None if part is None else part.index_select(0, indices.to(part.device)) for part in parts))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in (self.num_merged, self.num_dropped, self.holders) if part is not None)


def handed_on(before: Tensor | None, now: Tensor) -> Tensor:
    """`Slots.holders` over two folds, of which the second knows the slots of the first by their positions."""
    if before is None:
        return now.int()
    handed = now.gather(2, before.long().clamp_min(0)).masked_fill(before < 0, DROPPED)
    new = torch.ones_like(now, dtype=torch.bool)  # tokens that came since; a row may have had fewer than the others
    new[..., : before.shape[2]] = before == ABSENT
    return torch.where(new, now, torch.nn.functional.pad(handed, (0, now.shape[2] - before.shape[2]))).int()
