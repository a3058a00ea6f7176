"""StoredLayer: what one attention layer holds, over a storage, and what becomes of it when the batch changes.

Knows nothing of folds but what they left, and nothing of models.
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..states import Tally, fates_of_row
from ..storage import Storage
from .guards import Shape
from .shared import Shared


class StoredLayer(DynamicLayer):
    """A full-attention layer whose keys and values lie in a storage: the slots of the last fold, followed by the tail.

    Args:
        shared: what it shares with the other layers of its cache.
        layer_idx: its index.

    Attributes:
        seen: tokens seen, folded ones included.
        storage: where they lie.
        tally: what became of the evicted; `None` before the first fold.
    """

    def __init__(self, shared: Shared, layer_idx: int) -> None:
        # not calling the parent's: it would assign `keys` and `values`, which are computed here
        self.layer_idx = layer_idx
        self._shared = shared
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.seen = 0
        self.storage: Storage = self._shared.new_storage()
        self.tally: Tally | None = None
        self._shape: Shape | None = None
        self._token_nbytes = 0  # of a token's key and value in one head, as they came
        self._is_offloaded = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
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
        return None if self._shape is None else self._shape.batch

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
        return torch.full(self._shape[:2], self.num_slots, device=self.device)

    @property
    def stored_per_head(self) -> Tensor | None:
        """`[B, H]`, how many tokens each head stores, slots and tail; `None` before the first update."""
        return None if not self.num_stored else self.slots_per_head + self._tail

    @property
    def positions(self) -> Tensor | None:
        """`[B, H, S]`, the position in the sequence of each stored key, -1 where heads differ and this one has no slot.

        `None` before the first update.
        """
        if not self.num_stored:
            return None
        tail = torch.arange(self.seen - self._tail, self.seen, device=self.device).expand(*self._shape[:2], -1)
        of_slots = self.storage.positions
        return tail if of_slots is None else torch.cat([of_slots.long(), tail], dim=2)

    @property
    def log_mass(self) -> Tensor | None:
        """`[B, H, S]`, what is added to each slot's attention logits; `None` where there is nothing to add."""
        of_slots = self.storage.log_mass
        return None if of_slots is None else torch.nn.functional.pad(of_slots, (0, self._tail))

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
        return 0 if not self.seen else self._shape.batch * self._shape.heads * self.seen * self._token_nbytes

    def fates(self, row: int) -> Tensor:
        """`[H, n]`, the position of the slot that holds each of the n tokens of a row, padding left out.

        Its own for survivors, else `DROPPED`, or `ABSENT` where the cache does not trace.
        """
        holders = None if self.tally is None or self.tally.holders is None else self.tally.holders[row]
        return fates_of_row(self._shared.padding.row_positions(self.positions)[row], holders)

    @property
    def _tail(self) -> int:
        """How many tokens are stored as they came, behind the slots."""
        return self.storage.length - self.storage.num_slots

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the keys and values `[B, H, q, D]` of new tokens to the tail."""
        if not self.num_stored:
            # the layout that DynamicCache returns: another one may mean another kernel and other last bits
            keys, values = keys.contiguous(), values.contiguous()
            self._shape = Shape.of(keys, values)
            self._token_nbytes = sum(states.shape[3] * states.element_size() for states in (keys, values))
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
        self._shape = self._shape._replace(batch=len(indices))
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
