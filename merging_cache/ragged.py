"""Slots of heads that have different numbers of them: stored one after another without gaps, padded only to be read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Where each head of each row begins and how many slots it has, as numbers: a GPU is asked for them once."""
        return list(zip(self.starts.flatten().tolist(), self.lengths.flatten().tolist(), strict=True))

    @property
    def index(self) -> Tensor:
        """`[B, H, S]`, where each head's slots lie; before its first slot it points at another head's, or the first."""
        column = torch.arange(self.longest, device=self.lengths.device)
        return (column + (self.starts + self.lengths - self.longest).unsqueeze(-1)).clamp_min_(0)

    def pad(self, flat: Tensor, fill: float) -> Tensor:
        """`[N]` to `[B, H, S]`, with `fill` where a head has no slot."""
        return flat[self.index].masked_fill_(~self.valid, fill)

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

    It offers what `DenseStorage` does, except that its slots are never replaced (a fold makes another); `length` and
    `read` speak of heads padded to the longest.

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
        """Keys and values `[B, H, length, D]`; where a head has no slot, those of another, which masks must hide."""
        tails = self.tail.read() if self.tail.length else (None, None)
        keys, values = (self._padded(slots[0, 0], tail) for slots, tail in zip(self.slots.read(), tails, strict=True))
        return keys, values

    def _padded(self, slots: Tensor, tail: Tensor | None) -> Tensor:
        """Slots `[N, D]` and tail `[B, H, T, D]` as `[B, H, length, D]`, copied once."""
        batch, heads = self.layout.lengths.shape
        new = [slots[:0]] * (batch * heads) if tail is None else tail.flatten(0, 1)
        parts = []
        for (start, count), newest in zip(self.layout.spans, new, strict=True):
            parts += [slots[: self.layout.longest - count], slots[start : start + count], newest]
        return torch.cat(parts).view(batch, heads, self.length, -1)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values of new tokens."""
        self.tail.append(keys, values)

    def settle(self) -> None:
        """Quantize what gathered in the tail, where the storage does."""
        self.tail.settle()

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`, which must be of the tail."""
        self.tail.truncate(length - self.layout.longest)

    def select_rows(self, indices: Tensor) -> Tensor | None:
        """Make row `indices[i]` of the batch row i; returns which of the N slots are left, where not all are."""
        left = self._free_rows(indices)
        self.layout = self.layout.select_rows(indices)
        if self.tail.length:
            self.tail.select_rows(indices)
        return left

    def _free_rows(self, kept: Tensor) -> Tensor | None:
        """Give back the memory of rows that are not among the `kept`, where that is worth copying the others.

        What is quantized stays: it was packed in one piece.
        """
        starts, lengths = self.layout.starts, self.layout.lengths
        used = torch.zeros(len(lengths), dtype=torch.bool, device=lengths.device)
        used[kept.to(lengths.device)] = True
        num_used = int(lengths[used].sum())
        if not isinstance(self.slots, DenseStorage) or not 0 < num_used <= self.slots.length // 2:
            return None
        slots = self.layout.select_rows(used).spans
        flat = torch.cat([torch.arange(first, first + count, device=starts.device) for first, count in slots])
        keys, values = self.slots.read()
        self.slots.replace(keys[:, :, flat], values[:, :, flat])
        stored = lengths * used.unsqueeze(1)
        ends = stored.flatten().cumsum(0).view_as(lengths)
        self.layout = RaggedLayout(ends - stored, lengths, self.layout.longest)
        return flat

    def to(self, device: torch.device | str) -> None:
        """Move everything to `device`."""
        self.slots.to(device)
        if self.tail.length:
            self.tail.to(device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.slots.nbytes + self.tail.nbytes + self.layout.nbytes
