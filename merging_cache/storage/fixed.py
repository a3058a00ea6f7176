"""Keys and values in buffers that never grow or move: what compiled code and CUDA graphs can write to."""

from typing import NoReturn

import torch
from torch import Tensor

from .base import Storage


class FixedStorage(Storage):
    """What another storage holds, followed by room for so many tokens and no more.

    Args:
        held: the other storage, with slots that need nothing but keys and values to be read; it is copied.
        room: how many tokens may be appended.
    """

    def __init__(self, held: Storage, room: int) -> None:
        keys, values = held.read()
        self._num_slots, self._positions = held.num_slots, held.positions
        self.count = torch.tensor(held.length, device=keys.device)  # a number would be compiled into the graph
        self._keys, self._values = (torch.nn.functional.pad(states, (0, 0, 0, room)) for states in (keys, values))
        for tensor in (self._keys, self._values, self.count):
            torch._dynamo.mark_static_address(tensor)

    @property
    def length(self) -> int:
        """S, room included."""
        return self._keys.shape[2]

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def positions(self) -> Tensor | None:
        return self._positions

    @property
    def log_mass(self) -> None:
        return None

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values, zeros in the room that is left, which masks must hide."""
        return self._keys, self._values

    def append(self, keys: Tensor, values: Tensor) -> None:
        places = torch.arange(keys.shape[2], device=self.count.device) + self.count
        self.count.add_(keys.shape[2])
        for states, new in ((self._keys, keys), (self._values, values)):
            try:
                states.index_copy_(2, places, new)
            except NotImplementedError:  # on devices such as MPS it may be missing
                states[:, :, places] = new

    def select_rows(self, indices: Tensor) -> None:
        """Make row `indices[i]` of the batch row i, of as many as there are."""
        if len(indices) != len(self._keys):
            raise ValueError(f"fixed storage has {len(self._keys)} rows and cannot have {len(indices)}")
        for states in (self._keys, self._values):
            states.copy_(states.index_select(0, indices.to(states.device)))
        if self._positions is not None:
            self._positions = self._positions.index_select(0, indices.to(self._positions.device))

    def _refuse(self, *args: object) -> NoReturn:
        """Not possible: nothing is taken back or moved."""
        raise ValueError("fixed storage cannot be cropped or moved")

    truncate = to = _refuse

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self._keys, self._values, self._positions) if part is not None)
