"""Quantized keys and values: packed once, into segments that are never touched again until a fold.

A layer over this storage folds exactly like any other; only what it stores is packed.
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backends import Backend, packed_nbytes
from .base import EvenStorage
from .dense import DenseStorage


@dataclass(frozen=True)
class Segment:
    """Packed keys and values of `length` tokens, never changed.

    Cropping and reordering only note what to take when it is unpacked, so they are exact with every backend, and
    copies of a cache share the packed data.

    Args:
        packed_keys, packed_values: as the backend made them.
        length: how many of the first packed tokens still count.
        rows: `[B]`, which packed row is row i of the batch, or `None` where they are the same.
    """

    backend: Backend
    packed_keys: Any
    packed_values: Any
    length: int
    rows: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Segment":
        return self

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = self.backend.dequantize(self.packed_keys), self.backend.dequantize(self.packed_values)
        return self._taken(keys), self._taken(values)

    def select_rows(self, indices: Tensor) -> "Segment":
        return replace(self, rows=indices if self.rows is None else self.rows.to(indices.device)[indices])

    def _taken(self, states: Tensor) -> Tensor:
        states = states[:, :, : self.length]
        return states if self.rows is None else states.index_select(0, self.rows.to(states.device))

    @property
    def nbytes(self) -> int:
        return packed_nbytes(self.packed_keys) + packed_nbytes(self.packed_values)


class QuantizedStorage(EvenStorage):
    """Packed segments followed by a full-precision residual, which becomes a segment when it is long enough.

    Args:
        backend: what packs and unpacks.
        residual_length: tokens that may gather in full precision before they are quantized. Where the group size does
            not divide them evenly, the few tokens that are left over stay in the residual.
    """

    is_packed = True

    def __init__(self, backend: Backend, residual_length: int = 128) -> None:
        super().__init__()
        self.backend = backend
        self.residual_length = residual_length
        self.segments: list[Segment] = []
        self.residual = DenseStorage()

    @property
    def length(self) -> int:
        return sum(segment.length for segment in self.segments) + self.residual.length

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all stored tokens, dequantized."""
        parts = [segment.read() for segment in self.segments]
        if self.residual.length:
            parts.append(self.residual.read())
        if len(parts) == 1:
            return parts[0]
        return torch.cat([keys for keys, _ in parts], dim=2), torch.cat([values for _, values in parts], dim=2)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add new tokens to the tail, in full precision until `settle`."""
        self.residual.append(keys, values)

    def settle(self) -> None:
        """Quantize the residual if it is long enough; older segments are left as they are."""
        if self.residual.length and self.residual.length >= self.residual_length:
            keys, values = self.residual.read()
            self.residual = DenseStorage()
            self._pack(keys, values)

    def truncate(self, length: int) -> None:
        surplus = self.length - length
        from_residual = min(surplus, self.residual.length)
        self.residual.truncate(self.residual.length - from_residual)
        surplus -= from_residual
        while surplus:
            segment = self.segments.pop()
            if segment.length > surplus:
                self.segments.append(replace(segment, length=segment.length - surplus))
            surplus -= min(surplus, segment.length)

    def select_rows(self, indices: Tensor) -> None:
        super().select_rows(indices)
        self.segments = [segment.select_rows(indices) for segment in self.segments]
        self.residual.select_rows(indices)

    def to(self, device: torch.device | str) -> None:
        """Not possible: what a backend packed stays on its device."""
        raise ValueError(
            f"quantized states cannot be moved to {device}; use MergingDynamicCache(offloading=True) to keep layers in "
            "CPU memory between passes"
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated: packed data, scales and the residual."""
        return super().nbytes + sum(segment.nbytes for segment in self.segments) + self.residual.nbytes

    def _store(self, keys: Tensor, values: Tensor) -> None:
        self.segments, self.residual = [], DenseStorage()
        self._pack(keys, values)

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        """Quantize as many tokens as fit the group size into a new segment, keep the others in the residual."""
        if keys.requires_grad or values.requires_grad:
            warnings.warn(
                "gradients end where keys and values are quantized; read the prompt under torch.no_grad(), or take a "
                "MergingDynamicCache if you need them",
                stacklevel=2,
            )
            keys, values = keys.detach(), values.detach()
        backend = self.backend
        multiple = math.lcm(
            backend.token_multiple(keys.shape, backend.axis_key),
            backend.token_multiple(values.shape, backend.axis_value),
        )
        fitting = keys.shape[2] - keys.shape[2] % multiple
        if fitting:
            packed_keys = backend.quantize(keys[:, :, :fitting].contiguous(), backend.axis_key)
            packed_values = backend.quantize(values[:, :, :fitting].contiguous(), backend.axis_value)
            self.segments.append(Segment(backend, packed_keys, packed_values, fitting))
        if fitting < keys.shape[2]:
            self.residual.append(keys[:, :, fitting:], values[:, :, fitting:])
