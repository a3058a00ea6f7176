"""Where a layer keeps its keys and values in full precision: a buffer that grows by blocks."""

import torch
from torch import Tensor


class DenseStorage:
    """Keys and values `[B, H, length, D]` with room to append.

    Appending a token writes one row; once the room is used up a new buffer is made that is 1/16 longer than needed
    (`torch.cat`, as `DynamicCache` does it, reads and writes everything for every token; where gradients are enabled
    there is no other way). `QuantizedStorage` offers the same methods, `RaggedStorage` all but `hold` and
    `replace`.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._held = False

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all stored tokens; views, valid until something is appended, cropped or replaced."""
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values of new tokens."""
        self._keys = self._extended(self._keys, keys)
        self._values = self._extended(self._values, values)
        self.length += keys.shape[2]
        self._held = False

    def settle(self) -> None:
        """Called when what is stored will stay as it is for now; quantized storage quantizes then."""

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Store these in place of everything without copying what needs no copy, in full precision until `settle`."""
        self.replace(keys, values)
        self._held = True  # they may be the model's own, and are not written to

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Store these in place of everything, without room to spare."""
        self._keys, self._values = owned(keys), owned(values)
        self.length = keys.shape[2]
        self._held = False

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`."""
        self.length = length
        if length == 0:
            self._keys = self._values = None

    def select_rows(self, indices: Tensor) -> None:
        """Make row `indices[i]` of the batch row i."""
        indices = indices.to(self._keys.device)
        self._keys, self._values = self._keys.index_select(0, indices), self._values.index_select(0, indices)

    def to(self, device: torch.device | str) -> None:
        """Move everything to `device`."""
        self._keys = self._keys.to(device, non_blocking=True)
        self._values = self._values.to(device, non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, room to spare included."""
        return sum(states.nbytes for states in (self._keys, self._values) if states is not None)

    def _extended(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        needed = self.length + new.shape[2]
        if buffer is None:
            return new.clone(memory_format=torch.contiguous_format)
        if torch.is_grad_enabled():  # someone may want gradients of what earlier passes read from the buffer
            return torch.cat([buffer[:, :, : self.length], new], dim=2)
        if self._held or needed > buffer.shape[2] or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
            capacity = needed + needed // 16
            larger = buffer.new_empty((*buffer.shape[:2], capacity, buffer.shape[3]))
            larger[:, :, : self.length] = buffer[:, :, : self.length]
            buffer = larger
        buffer[:, :, self.length : needed] = new
        return buffer


def owned(states: Tensor) -> Tensor:
    """`states`, copied if they are a view that keeps more memory alive than they need."""
    if states.is_contiguous() and states.untyped_storage().nbytes() == states.nbytes:
        return states
    return states.clone(memory_format=torch.contiguous_format)
