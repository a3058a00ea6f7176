"""Slots of heads that have different numbers of them: stored one after another without gaps, padded only to be read."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .storage import DenseStorage


@dataclass(frozen=True)
class RaggedLayout:
    """Where the slots of each row and head lie among N slots stored one after another.

    Rows may share slots: reordering or repeating the batch only changes where each row looks.

    Args:
        starts: `[B, H]`, the first slot of each row and head.
        lengths: `[B, H]`, how many it has.
        longest: S, the largest of the lengths.
    """

    starts: Tensor
    lengths: Tensor
    longest: int

    @classmethod
    def of_valid(cls, valid: Tensor) -> "RaggedLayout":
        """The layout of the slots marked in `[B, H, S]` bool."""
        lengths = valid.sum(dim=-1)
        ends = lengths.flatten().cumsum(0).view_as(lengths)
        return cls(ends - lengths, lengths, valid.shape[2])

    @property
    def valid(self) -> Tensor:
        """`[B, H, S]` bool, True where there is a slot; each head's are the last."""
        return torch.arange(self.longest, device=self.lengths.device) >= self.longest - self.lengths.unsqueeze(-1)

    def pad(self, flat: Tensor, fill: float = 0) -> Tensor:
        """`[N, ...]` to `[B, H, S, ...]`, with `fill` where a head has no slot."""
        column = torch.arange(self.longest, device=self.lengths.device)
        # before its first slot a head reads another's, or the first of all
        index = (column + (self.starts + self.lengths - self.longest).unsqueeze(-1)).clamp_min_(0)
        if not len(flat):
            return flat.new_full((*index.shape, *flat.shape[1:]), fill)
        padded = flat.index_select(0, index.flatten()).view(*index.shape, *flat.shape[1:])
        absent = ~self.valid.view(*index.shape, *[1] * (flat.dim() - 1))
        return padded.masked_fill_(absent, fill)

    def select_rows(self, indices: Tensor) -> "RaggedLayout":
        """Make row `indices[i]` of the batch row i."""
        indices = indices.to(self.starts.device)
        return RaggedLayout(self.starts[indices], self.lengths[indices], self.longest)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.starts.nbytes + self.lengths.nbytes


class RaggedStorage:
    """Storage whose slots follow a `RaggedLayout`, and whose tail is the same for all heads.

    It offers what `DenseStorage` does; `length` and `read` speak of heads padded to the longest.

    Args:
        new_storage: makes the storages it is built of, one for the slots of all rows and heads and one for the tail.
        layout: where the slots lie.
        keys, values: `[B, H, S, D]`, the slots, padded as the layout says.
    """

    def __init__(
        self, new_storage: Callable[[], DenseStorage], layout: RaggedLayout, keys: Tensor, values: Tensor
    ) -> None:
        self.layout = layout
        self.slots, self.tail = new_storage(), new_storage()
        valid = layout.valid
        self.slots.replace(keys[valid][None, None], values[valid][None, None])

    @property
    def length(self) -> int:
        """Slots of the longest head, and the tail."""
        return self.layout.longest + self.tail.length

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H, length, D]`, zero where a head has no slot."""
        slots = [self.layout.pad(flat[0, 0]) for flat in self.slots.read()]
        if not self.tail.length:
            return slots[0], slots[1]
        tail = self.tail.read()
        return torch.cat([slots[0], tail[0]], dim=2), torch.cat([slots[1], tail[1]], dim=2)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values of new tokens."""
        self.tail.append(keys, values)

    def settle(self) -> None:
        """Quantize what gathered in the tail, where the storage does."""
        self.tail.settle()

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`, which must be of the tail."""
        self.tail.truncate(length - self.layout.longest)

    def select_rows(self, indices: Tensor) -> None:
        """Make row `indices[i]` of the batch row i."""
        self.layout = self.layout.select_rows(indices)
        if self.tail.length:
            self.tail.select_rows(indices)

    def to(self, device: torch.device | str) -> None:
        """Move everything to `device`."""
        self.slots.to(device)
        if self.tail.length:
            self.tail.to(device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.slots.nbytes + self.tail.nbytes + self.layout.nbytes
