"""What every storage of a layer can do. Storages know how keys and values lie in memory, and never when to fold."""

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor


class Storage(ABC):
    """Keeps the tokens of one layer: the slots of its last fold, followed by the tail, the tokens appended since.

    Keys and values are `[B, H, S, D]`, in full precision as they are appended and read.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "Storage":
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():  # gradients flow through copies, too, which `deepcopy` refuses
            vars(twin)[name] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value, memo)
        return twin

    # What is stored ---------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def length(self) -> int:
        """S, the slots (of the head that has most) and the tail together, and room where `read` gives it, too."""

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """How many of them are slots; 0 before the first fold."""

    @property
    @abstractmethod
    def positions(self) -> Tensor | None:
        """`[B, H, num_slots]`, the position of each slot's survivor, -1 where a head has no slot; `None` without."""

    @property
    @abstractmethod
    def log_mass(self) -> Tensor | None:
        """`[B, H, num_slots]`, added to a slot's attention logits, -inf where a head has none; `None` for all zeros."""

    @property
    def statistics(self) -> Tensor | None:
        """`[B, H, num_slots, ...]`, what the scorer keeps for each slot's token, 0 where a head has none; or `None`."""
        return None

    @property
    def valid(self) -> Tensor | None:
        """`[B, H, num_slots]` bool, where there is a slot, the last ones of each head; `None` where heads agree."""
        return None

    def bias(self, least: float) -> Tensor | None:
        """`[B, H, num_slots]`, `log_mass` and `least` where a head has no slot; `None` where both are none."""
        valid, log_mass = self.valid, self.log_mass
        if valid is None:
            return None if log_mass is None else log_mass.float()
        bias = torch.zeros(valid.shape, device=valid.device) if log_mass is None else log_mass.float()
        return bias.masked_fill(~valid, max(least, torch.finfo(bias.dtype).min))

    @abstractmethod
    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all that is stored; valid until something is appended, taken away or replaced."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated, room to spare included."""

    # How it changes ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values of new tokens to the tail."""

    def settle(self) -> None:  # noqa: B027 (most have nothing to do then)
        """Quantize what gathered in the tail, where the storage does: it will stay as it is for now."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`, which are of the tail."""

    @abstractmethod
    def select_rows(self, indices: Tensor) -> None:
        """Make row `indices[i]` of the batch row i."""

    @abstractmethod
    def to(self, device: torch.device | str) -> None:
        """Move keys and values to `device`; positions and mass, a few bytes a slot, stay."""


class EvenStorage(Storage):
    """Storage in which all heads have equally many slots."""

    is_packed: ClassVar[bool] = False
    """Whether slots were packed together, so that taking some of them out means to pack the others again."""

    def __init__(self) -> None:
        self._positions: Tensor | None = None
        self._log_mass: Tensor | None = None
        self._statistics: Tensor | None = None

    @property
    def num_slots(self) -> int:
        return 0 if self._positions is None else self._positions.shape[2]

    @property
    def positions(self) -> Tensor | None:
        return self._positions

    @property
    def log_mass(self) -> Tensor | None:
        return self._log_mass

    @property
    def statistics(self) -> Tensor | None:
        kept = self._statistics
        return kept.float() if kept is not None and kept.is_floating_point() else kept

    def fill(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        log_mass: Tensor | None,
        statistics: Tensor | None = None,
    ) -> None:
        """Store these slots in place of everything.

        Args:
            keys, values: `[B, H, S, D]`, which the storage may keep as its own.
            positions, log_mass: `[B, H, S]`.
            statistics: `[B, H, S, ...]`, of which floats are kept in 16 bits.
        """
        self._positions = positions.int()  # 4 bytes a slot; a view of 8 would count against small heads
        self._log_mass = log_mass
        is_float = statistics is not None and statistics.is_floating_point()
        self._statistics = statistics.bfloat16() if is_float else statistics
        self._store(keys, values)

    @abstractmethod
    def _store(self, keys: Tensor, values: Tensor) -> None:
        """Store these in place of everything."""

    def select_rows(self, indices: Tensor) -> None:
        self._positions, self._log_mass, self._statistics = (
            None if part is None else part.index_select(0, indices.to(part.device)) for part in self._of_slots
        )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._of_slots if part is not None)

    @property
    def _of_slots(self) -> tuple[Tensor | None, ...]:
        """What is kept of each slot besides its key and value."""
        return self._positions, self._log_mass, self._statistics
