"""Slots of heads that have different numbers of them: stored one after another without gaps, padded only to be read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..states import Slots
from .base import EvenStorage, Storage


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
        """`[N, ...]` to `[B, H, S, ...]`, with `fill` where a head has no slot."""
        valid = self.valid
        return flat[self.index].masked_fill_(~valid.view(*valid.shape, *[1] * (flat.dim() - 1)), fill)

    def select_rows(self, indices: Tensor) -> "RaggedLayout":
        """Make row `indices[i]` of the batch row i."""
        indices = indices.to(self.starts.device)
        return RaggedLayout(self.starts[indices], self.lengths[indices], self.longest)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.starts.nbytes + self.lengths.nbytes


class RaggedStorage(Storage):
    """Storage whose slots follow a `RaggedLayout`, and whose tail is the same for all heads.

    `length` and `read` speak of heads padded to the longest; where a head has no slot, keys and values are those of
    another, which masks must hide.

    Args:
        new_storage: makes the storages it is built of, one for the tail and one for the slots of all rows and heads as
            if they were those of one head.
        slots: as a fold left them.
    """

    def __init__(self, new_storage: Callable[[], EvenStorage], slots: Slots) -> None:
        self.layout = RaggedLayout.of_valid(slots.valid)
        self._slots, self._tail = new_storage(), new_storage()
        parts = (slots.keys, slots.values, slots.positions, slots.log_mass, slots.statistics)
        self._slots.fill(*(None if part is None else part[slots.valid][None, None] for part in parts))

    @property
    def length(self) -> int:
        return self.layout.longest + self._tail.length

    @property
    def num_slots(self) -> int:
        return self.layout.longest

    @property
    def positions(self) -> Tensor:
        return self.layout.pad(self._slots.positions[0, 0], -1)

    @property
    def log_mass(self) -> Tensor | None:
        log_mass = self._slots.log_mass
        return None if log_mass is None else self.layout.pad(log_mass[0, 0], -torch.inf)

    @property
    def statistics(self) -> Tensor | None:
        statistics = self._slots.statistics
        return None if statistics is None else self.layout.pad(statistics[0, 0], 0)

    @property
    def valid(self) -> Tensor:
        return self.layout.valid

    def read(self) -> tuple[Tensor, Tensor]:
        tails = self._tail.read() if self._tail.length else (None, None)
        keys, values = (self._padded(slots[0, 0], tail) for slots, tail in zip(self._slots.read(), tails, strict=True))
        return keys, values

    def _padded(self, slots: Tensor, tail: Tensor | None) -> Tensor:
        """Slots `[N, D]` and tail `[B, H, T, D]` as `[B, H, length, D]`, copied once."""
        batch, heads = self.layout.lengths.shape
        new = [slots[:0]] * (batch * heads) if tail is None else tail.flatten(0, 1)
        parts = []
        for (start, count), newest in zip(self.layout.spans, new, strict=True):
            gap = self.layout.longest - count
            # rows that are gone may have left fewer slots than it takes to fill the gap
            fill = slots[:gap] if gap <= len(slots) else slots[:1].expand(gap, -1)
            parts += [fill, slots[start : start + count], newest]
        return torch.cat(parts).view(batch, heads, self.length, -1)

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._tail.append(keys, values)

    def settle(self) -> None:
        self._tail.settle()

    def truncate(self, length: int) -> None:
        self._tail.truncate(length - self.layout.longest)

    def select_rows(self, indices: Tensor) -> None:
        self._free_rows(indices)
        self.layout = self.layout.select_rows(indices)
        self._tail.select_rows(indices)

    def _free_rows(self, kept: Tensor) -> None:
        """Give back the memory of rows that are not among the `kept`, where that is worth copying the others."""
        starts, lengths = self.layout.starts, self.layout.lengths
        used = torch.zeros(len(lengths), dtype=torch.bool, device=lengths.device)
        used[kept.to(lengths.device)] = True
        num_used = int(lengths[used].sum())
        if self._slots.is_packed or not 0 < num_used <= self._slots.length // 2:
            return
        spans = self.layout.select_rows(used).spans
        left = torch.cat([torch.arange(first, first + count, device=starts.device) for first, count in spans])
        parts = (*self._slots.read(), self._slots.positions, self._slots.log_mass, self._slots.statistics)
        self._slots.fill(*(None if part is None else part[:, :, left.to(part.device)] for part in parts))
        stored = lengths * used.unsqueeze(1)
        ends = stored.flatten().cumsum(0).view_as(lengths)
        self.layout = RaggedLayout(ends - stored, lengths, self.layout.longest)

    def to(self, device: torch.device | str) -> None:
        self._slots.to(device)
        self._tail.to(device)

    @property
    def nbytes(self) -> int:
        return self._slots.nbytes + self._tail.nbytes + self.layout.nbytes
