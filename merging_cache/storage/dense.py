"""Keys and values in full precision: a buffer that grows by blocks."""

import torch
from torch import Tensor

from .base import EvenStorage


class DenseStorage(EvenStorage):
    """Keys and values with room to append.

    Appending a token writes one row; once the room is used up a new buffer is made that is 1/16 longer than needed
    (`torch.cat`, as `DynamicCache` does it, reads and writes everything for every token; where gradients are enabled
    there is no other way).
    """

    def __init__(self) -> None:
        super().__init__()
        self._length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._is_borrowed = False  # the first keys and values may be the model's own, and are not written to

    @property
    def length(self) -> int:
        return self._length

    def read(self) -> tuple[Tensor, Tensor]:
        return self._keys[:, :, : self._length], self._values[:, :, : self._length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add new tokens to the tail; the first of all are kept as they are where they own their memory."""
        if self._keys is None:
            self._store(keys, values)
            self._is_borrowed = True
            return
        self._keys = self._extended(self._keys, keys)
        self._values = self._extended(self._values, values)
        self._length += keys.shape[2]
        self._is_borrowed = False

    def truncate(self, length: int) -> None:
        self._length = length
        if length == 0:
            self._keys = self._values = None

    def select_rows(self, indices: Tensor) -> None:
        super().select_rows(indices)
        if self._keys is not None:
            indices = indices.to(self._keys.device)
            self._keys, self._values = self._keys.index_select(0, indices), self._values.index_select(0, indices)

    def to(self, device: torch.device | str) -> None:
        if self._keys is not None:
            self._keys = self._keys.to(device, non_blocking=True)
            self._values = self._values.to(device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(states.nbytes for states in (self._keys, self._values) if states is not None)

    def _store(self, keys: Tensor, values: Tensor) -> None:
        """Without room to spare, and without copying what owns its memory."""
        self._keys, self._values = owned(keys), owned(values)
        self._length = keys.shape[2]
        self._is_borrowed = False

    def _extended(self, buffer: Tensor, new: Tensor) -> Tensor:
        needed = self._length + new.shape[2]
        if torch.is_grad_enabled():  # someone may want gradients of what earlier passes read from the buffer
            return torch.cat([buffer[:, :, : self._length], new], dim=2)
        outlived = buffer.is_inference() and not torch.is_inference_mode_enabled()
        dtype = torch.promote_types(buffer.dtype, new.dtype)  # as `torch.cat` does
        if self._is_borrowed or needed > buffer.shape[2] or outlived or dtype != buffer.dtype:
            capacity = needed + needed // 16
            larger = buffer.new_empty((*buffer.shape[:2], capacity, buffer.shape[3]), dtype=dtype)
            larger[:, :, : self._length] = buffer[:, :, : self._length]
            buffer = larger
        buffer[:, :, self._length : needed] = new
        return buffer


def owned(states: Tensor) -> Tensor:
    """`states`, copied if they are a view that keeps more memory alive than they need."""
    if states.is_contiguous() and states.untyped_storage().nbytes() == states.nbytes:
        return states
    return states.clone(memory_format=torch.contiguous_format)
