"""Quantized storage: full-precision states are quantized once, into segments that are never touched again until a fold.

A layer over this storage folds exactly like any other; only what it stores is packed. Each backend is used for two
things alone, `quantize(tensor) -> packed` and `dequantize(packed) -> tensor`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .stage import check_choice, check_number
from .storage import DenseStorage


class Backend(ABC):
    """Packs `[B, H, L, D]` tensors.

    Args:
        axis_key, axis_value: the quantization axis of keys and of values, in the backend's own numbering.
        group_size: elements that share a scale; `None` for the largest divisor of the head dimension up to 64, so that
            groups lie inside one token and requantizing an untouched slot costs nothing.
    """

    def __init__(self, axis_key: int, axis_value: int, group_size: int | None = None) -> None:
        if group_size is not None:
            check_number("q_group_size", group_size, int, minimum=1)
        self.axis_key = axis_key
        self.axis_value = axis_value
        self.group_size = group_size

    def group_of(self, head_dim: int) -> int:
        """The group size for this head dimension."""
        return self.group_size or math.gcd(head_dim, 64)

    @abstractmethod
    def quantize(self, states: Tensor, axis: int) -> Any:
        """Pack a contiguous `[B, H, L, D]` tensor, L a multiple of `token_multiple`."""

    @abstractmethod
    def dequantize(self, packed: Any) -> Tensor:
        """The tensor again, in the precision it came in."""

    def token_multiple(self, shape: torch.Size, axis: int) -> int:
        """The smallest number of tokens of which every multiple can be packed, for states of this `[B, H, L, D]`."""
        return 1


class QuantoBackend(Backend):
    """int4 and int2 by optimum-quanto: axis 0 groups within a token (if `group_size` divides D), -1 across tokens."""

    def __init__(self, nbits: int = 4, axis_key: int = 0, axis_value: int = 0, group_size: int | None = None) -> None:
        super().__init__(axis_key, axis_value, group_size)
        check_choice("nbits of backend 'quanto'", nbits, (2, 4))
        check_choice("axis_key of backend 'quanto'", axis_key, (0, -1))
        check_choice("axis_value of backend 'quanto'", axis_value, (0, -1))
        try:
            import optimum.quanto as quanto
        except ImportError as error:
            raise ImportError("backend='quanto' needs optimum-quanto: pip install 'merging_cache[quanto]'") from error
        self.qtype = {2: quanto.qint2, 4: quanto.qint4}[nbits]
        self.optimizer = quanto.MaxOptimizer()
        self._quantize_weight = quanto.quantize_weight

    def quantize(self, states: Tensor, axis: int) -> Any:
        group = self.group_of(states.shape[-1])
        scale, shift = self.optimizer(states, self.qtype, axis, group)
        return self._quantize_weight(states, self.qtype, axis, scale, shift, group, optimized=False)

    def dequantize(self, packed: Any) -> Tensor:
        return packed.dequantize()

    def token_multiple(self, shape: torch.Size, axis: int) -> int:
        batch, heads, _, dim = shape
        group = self.group_of(dim)
        return group // math.gcd(group, heads * dim if axis == 0 else batch * heads)


class HQQBackend(Backend):
    """1, 2, 4 or 8 bits by hqq (half-quadratic quantization): axis 1 groups within a token, 0 across tokens.

    Its 3 bits are packed ten to a word and padded, which cannot be undone for every number of tokens.
    """

    def __init__(self, nbits: int = 4, axis_key: int = 1, axis_value: int = 1, group_size: int | None = None) -> None:
        super().__init__(axis_key, axis_value, group_size)
        check_choice("nbits of backend 'hqq'", nbits, (1, 2, 4, 8))
        check_choice("axis_key of backend 'hqq'", axis_key, (0, 1))
        check_choice("axis_value of backend 'hqq'", axis_value, (0, 1))
        try:
            from hqq.core.quantize import Quantizer
        except ImportError as error:
            raise ImportError("backend='hqq' needs hqq: pip install 'merging_cache[hqq]'") from error
        self.nbits = nbits
        self.quantizer = Quantizer

    def quantize(self, states: Tensor, axis: int) -> Any:
        packed, meta = self.quantizer.quantize(
            states,
            nbits=self.nbits,
            axis=axis,
            group_size=self.group_of(states.shape[-1]),
            device=str(states.device),
            compute_dtype=states.dtype,
        )
        meta["compute_dtype"] = states.dtype  # hqq computes scales in fp32 and leaves this to whoever calls it
        return packed, meta

    def dequantize(self, packed: Any) -> Tensor:
        states, meta = packed
        return self.quantizer.dequantize(states, meta).to(meta["compute_dtype"])

    def token_multiple(self, shape: torch.Size, axis: int) -> int:
        # hqq packs rows of its grouped matrix together, as many as fit a byte
        batch, heads, _, dim = shape
        rows_per_item = {1: 8, 2: 4, 4: 2}.get(self.nbits, 1)
        unit = self.group_of(dim) * (rows_per_item if axis == 1 else 1)
        return unit // math.gcd(unit, batch * heads * dim)


class Fp8Backend(Backend):
    """8-bit floats (e4m3) with one scale per token and head; needs no further package."""

    def __init__(self) -> None:
        super().__init__(axis_key=-1, axis_value=-1)

    def quantize(self, states: Tensor, axis: int) -> Any:
        largest = torch.finfo(torch.float8_e4m3fn).max
        # rounding the scale itself to the model's precision first keeps requantizing exact
        scale = (states.float().abs().amax(dim=-1, keepdim=True) / largest).to(states.dtype)
        scale = scale.clamp_min(torch.finfo(states.dtype).tiny)
        scaled = (states.float() / scale.float()).clamp(-largest, largest)
        return scaled.to(torch.float8_e4m3fn), scale

    def dequantize(self, packed: Any) -> Tensor:
        states, scale = packed
        return (states.float() * scale.float()).to(scale.dtype)


BACKENDS: dict[str, type[Backend]] = {"quanto": QuantoBackend, "hqq": HQQBackend, "fp8": Fp8Backend}


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


class QuantizedStorage:
    """Packed segments followed by a full-precision residual, which becomes a segment when it is long enough.

    Args:
        backend: what packs and unpacks.
        residual_length: tokens that may gather in full precision before they are quantized. Where the group size does
            not divide them evenly, the few tokens that are left over stay in the residual.
    """

    def __init__(self, backend: Backend, residual_length: int = 128) -> None:
        self.backend = backend
        self.residual_length = residual_length
        self.segments: list[Segment] = []
        self.residual = DenseStorage()

    @property
    def length(self) -> int:
        """Tokens stored."""
        return sum(segment.length for segment in self.segments) + self.residual.length

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all stored tokens `[B, H, length, D]`, dequantized."""
        parts = [segment.read() for segment in self.segments]
        if self.residual.length:
            parts.append(self.residual.read())
        if len(parts) == 1:
            return parts[0]
        return torch.cat([keys for keys, _ in parts], dim=2), torch.cat([values for _, values in parts], dim=2)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new tokens, in full precision until `settle`."""
        self.residual.append(keys, values)

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Store these in place of everything, in full precision until `settle`."""
        self.segments, self.residual = [], DenseStorage()
        self.residual.hold(keys, values)

    def settle(self) -> None:
        """Quantize the residual if it is long enough; older segments are left as they are."""
        if self.residual.length and self.residual.length >= self.residual_length:
            keys, values = self.residual.read()
            self.residual = DenseStorage()
            self._pack(keys, values)

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Quantize these, in place of everything."""
        self.segments, self.residual = [], DenseStorage()
        self._pack(keys, values)

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`."""
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
        """Make row `indices[i]` of the batch row i."""
        self.segments = [segment.select_rows(indices) for segment in self.segments]
        if self.residual.length:
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
        return sum(segment.nbytes for segment in self.segments) + self.residual.nbytes

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        """Quantize as many tokens as fit the group size into a new segment, keep the others in the residual."""
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


def make_backend(
    name: str, nbits: int | None, axis_key: int | None, axis_value: int | None, q_group_size: int | None
) -> Backend:
    """A backend by its name; options left at `None` take the backend's defaults.

    Raises:
        ValueError: for an unknown backend, or an option it does not have.
        TypeError: for a backend that is not a name.
        ImportError: if its package is not installed.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend is {type(name).__name__}; give the name of one of {list(BACKENDS)}")
    check_choice("backend", name, tuple(BACKENDS))
    options = {"nbits": nbits, "axis_key": axis_key, "axis_value": axis_value, "group_size": q_group_size}
    options = {option: value for option, value in options.items() if value is not None}
    if name == "fp8" and options:
        raise ValueError(f"backend 'fp8' has one scale per token and takes no {sorted(options)}; leave them out")
    return BACKENDS[name](**options)


def packed_nbytes(packed: Any) -> int:
    """Bytes of the plain tensors inside whatever a backend packed."""
    if isinstance(packed, Tensor):
        if hasattr(packed, "__tensor_flatten__"):
            names, _ = packed.__tensor_flatten__()
            return sum(packed_nbytes(getattr(packed, name)) for name in names)
        return packed.nbytes
    if isinstance(packed, dict):
        packed = packed.values()
    elif not isinstance(packed, (tuple, list)):
        return 0
    return sum(packed_nbytes(part) for part in packed)
