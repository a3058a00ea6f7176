"""StoredLayer: what one attention layer holds, over a storage, and what becomes of it when the batch changes.

Knows what folds left, but not when or how they are done, and nothing of attention.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..states import ABSENT, Tally
from ..storage import Storage
from .shared import Shared


class Shape(NamedTuple):
    """What stays the same of the keys and values of a layer from pass to pass."""

    batch: int
    heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> "Shape":
        """That of keys and values `[B, H, L, D]`."""
        return cls(keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3])


class StoredLayer(DynamicLayer):
    """A full-attention layer whose keys and values lie in a storage: the slots of the last fold, followed by the tail.

    Args:
        shared: what it shares with the other layers of its cache.
        layer_idx: its index.

    Attributes:
        seen: tokens seen, folded ones included.
        storage: where they lie.
        tally: what became of the evicted; `None` before the first fold.
        shape: of the keys and values of a pass, but for its length; `None` before the first update.
        dtype: of the keys.
    """

    def __init__(self, shared: Shared, layer_idx: int) -> None:
        # not calling the parent's: it would assign `keys` and `values`, which are computed here
        self.layer_idx = layer_idx
        self.join(shared)
        self._clear()

    def join(self, shared: Shared) -> None:
        """Belong to the cache whose layers share this."""
        self._shared = shared

    def _clear(self) -> None:
        self.is_initialized = False
        self.seen = 0
        self.storage: Storage = self._shared.new_storage()
        self.tally: Tally | None = None
        self.shape: Shape | None = None
        self._is_offloaded = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.is_initialized = True

    # What is stored ---------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:
        """`[B, H, S, D]` stored keys, slots then tail, in full precision; `None` before the first update.

        Where heads differ and this one has no slot (`positions` is -1), what stands here means nothing.
        """
        return self.storage.read()[0] if self.num_stored else None

    @property
    def values(self) -> Tensor | None:
        """`[B, H, S, D]`, like `keys`."""
        return self.storage.read()[1] if self.num_stored else None

    @property
    def batch(self) -> int | None:
        """Rows of the batch; `None` before the first update."""
        return None if self.shape is None else self.shape.batch

    @property
    def num_stored(self) -> int:
        """S, the slots and the tail together."""
        return self.storage.length

    @property
    def num_slots(self) -> int:
        """Slots per head left by the last fold (of the head that has most); what is stored beyond them is the tail."""
        return self.storage.num_slots

    @property
    def slots_per_head(self) -> Tensor | None:
        """`[B, H]`, how many slots each head has; `None` before the first update."""
        if not self.num_stored:
            return None
        if (valid := self.storage.valid) is not None:
            return valid.sum(dim=-1)
        return torch.full(self.shape[:2], self.num_slots, device=self.device)

    @property
    def stored_per_head(self) -> Tensor | None:
        """`[B, H]`, how many tokens each head stores, slots and tail; `None` before the first update."""
        return None if not self.num_stored else self.slots_per_head + self.num_tail

    @property
    def positions(self) -> Tensor | None:
        """`[B, H, S]`, the position in the sequence of each stored key, -1 where heads differ and this one has no slot.

        `None` before the first update.
        """
        if not self.num_stored:
            return None
        tail = torch.arange(self.seen - self.num_tail, self.seen, device=self.device).expand(*self.shape[:2], -1)
        of_slots = self.storage.positions
        return tail if of_slots is None else torch.cat([of_slots.long(), tail], dim=2)

    @property
    def log_mass(self) -> Tensor | None:
        """`[B, H, S]`, the logarithm of how many tokens' attention each slot draws, `None` where all draw their own.

        It is added to the slot's attention logits; -inf where a head has no slot.
        """
        of_slots = self.storage.log_mass
        return None if of_slots is None else torch.nn.functional.pad(of_slots, (0, self.num_tail))

    @property
    def num_merged(self) -> Tensor | None:
        """`[B, H]`, tokens evicted so far that were folded into a survivor; `None` before the first fold."""
        return None if self.tally is None else self.tally.num_merged

    @property
    def num_dropped(self) -> Tensor | None:
        """`[B, H]`, tokens evicted so far that were not."""
        return None if self.tally is None else self.tally.num_dropped

    @property
    def nbytes(self) -> int:
        """Bytes this layer holds: keys, values, positions, mass and counts."""
        return self.storage.nbytes + (0 if self.tally is None else self.tally.nbytes)

    @property
    def full_nbytes(self) -> int:
        """Bytes that `DynamicCache` would hold for the tokens seen."""
        if not self.seen:
            return 0
        of_token = self.shape.key_dim * self.dtype.itemsize + self.shape.value_dim * self._value_dtype.itemsize
        return self.shape.batch * self.shape.heads * self.seen * of_token

    def fates(self, row: int) -> Tensor:
        """`[H, n]`, the position of the slot that holds each of the n tokens of a row, padding left out.

        Its own for survivors, else `DROPPED`, or `ABSENT` where the cache does not trace.
        """
        positions = self._shared.padding.row_positions(self.positions)[row]  # [H, S], negative where there is no slot
        fates = torch.full((len(positions), int(positions.max()) + 1), ABSENT, device=positions.device)
        if self.tally is not None and (holders := self.tally.holders) is not None:
            fates[:, : holders.shape[2]] = holders[row, :, : fates.shape[1]].long()
        for of_head, stored in zip(fates, positions, strict=True):
            stored = stored[stored >= 0]
            of_head[stored] = stored
        return fates

    @property
    def num_tail(self) -> int:
        """How many tokens are stored as they came, behind the slots."""
        return self.storage.length - self.storage.num_slots

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values `[B, H, q, D]` of new tokens to the tail."""
        if not self.num_stored:
            # the layout that DynamicCache returns: another one may mean another kernel and other last bits
            keys, values = keys.contiguous(), values.contiguous()
            self.shape, self.dtype, self._value_dtype = Shape.of(keys, values), keys.dtype, values.dtype
        elif (keys.dtype, values.dtype) != (self.dtype, self._value_dtype):
            self.dtype = torch.promote_types(self.dtype, keys.dtype)
            self._value_dtype = torch.promote_types(self._value_dtype, values.dtype)
        self.storage.append(keys, values)
        self.seen += keys.shape[2]

    def take_back(self, new: int) -> None:
        """Forget the last `new` tokens, which are of the tail."""
        self.storage.truncate(self.num_stored - new)
        self.seen -= new

    # The batch --------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Back to an empty layer."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row `beam_idx[i]` row i."""
        self._select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.num_stored:
            self._select_rows(torch.arange(self.batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`, given as integers or as a bool mask."""
        if self.num_stored:
            self._select_rows(torch.arange(self.batch, device=self.device)[indices])

    def _select_rows(self, indices: Tensor) -> None:
        if not self.num_stored:
            return
        self.storage.select_rows(indices)
        self.shape = self.shape._replace(batch=len(indices))
        self.tally = None if self.tally is None else self.tally.select_rows(indices)

    def offload(self) -> None:
        """Move keys and values to the CPU; positions, a few bytes a slot, stay."""
        if self.num_stored:
            self.storage.to("cpu")
            self._is_offloaded = True

    def prefetch(self) -> None:
        """Move keys and values back."""
        if self.num_stored:
            self.storage.to(self.device)
            self._is_offloaded = False
