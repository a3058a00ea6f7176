"""What packs full-precision tensors into few bits and unpacks them: quanto, hqq, 8-bit floats.

Each backend is used for two things alone, `quantize(tensor) -> packed` and `dequantize(packed) -> tensor`.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..stage import check_choice, check_number


class Backend(ABC):
    """Packs `[B, H, L, D]` tensors.

    Args:
        name: and the number of bits, as people say it: `"quanto-4"`.
        axis_key, axis_value: the quantization axis of keys and of values, in the backend's own numbering.
        group_size: elements that share a scale; `None` for the largest divisor of the head dimension up to 64, so that
            groups lie inside one token and requantizing an untouched slot costs nothing.
    """

    def __init__(self, name: str, axis_key: int, axis_value: int, group_size: int | None = None) -> None:
        if group_size is not None:
            check_number("q_group_size", group_size, int, minimum=1)
        self.name = name
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
        super().__init__(f"quanto-{nbits}", axis_key, axis_value, group_size)
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
        super().__init__(f"hqq-{nbits}", axis_key, axis_value, group_size)
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
        super().__init__("fp8", axis_key=-1, axis_value=-1)

    def quantize(self, states: Tensor, axis: int) -> Any:
        largest = torch.finfo(torch.float8_e4m3fn).max
        # rounding the scale itself to the model's precision first keeps requantizing exact
        scale = (states.float().abs().amax(dim=-1, keepdim=True) / largest).to(states.dtype)
        scale = scale.clamp_min(torch.finfo(states.dtype).tiny)
        scaled = (states.float() / scale.float()).clamp(-largest, largest)
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale  # torch cannot pickle floats of 8 bits

    def dequantize(self, packed: Any) -> Tensor:
        states, scale = packed
        return (states.view(torch.float8_e4m3fn).float() * scale.float()).to(scale.dtype)


BACKENDS: dict[str, type[Backend]] = {"quanto": QuantoBackend, "hqq": HQQBackend, "fp8": Fp8Backend}


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
