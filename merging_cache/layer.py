"""MergingLayer: one attention layer's slots and tail, when they are folded, and their geometry for transformers.

Stored keys and values are the slots of the last fold followed by the tail, the tokens appended since. Knows nothing of
how tokens are scored, chosen and merged (`fold.py`) or of the precision they are stored in (`storage.py`).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .config import MergingConfig
from .padding import Padding
from .states import LayerStates, Slots
from .storage import DenseStorage

# up to transformers 5.14 a positive argument of `crop` was the length to crop to; since, only negative ones are allowed
CROP_TAKES_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


class MergingLayer(DynamicLayer):
    """A full-attention layer that folds.

    Attributes:
        seen: tokens seen, folded ones included.
        num_slots: slots per head left by the last fold; what is stored beyond them is the tail.
        num_merged, num_dropped: `[B, H]`, tokens evicted so far that were folded into a survivor, and that were not.
    """

    def __init__(
        self,
        config: MergingConfig,
        padding: Padding,
        layer_idx: int,
        storage: Callable[[], DenseStorage] = DenseStorage,
    ) -> None:
        # not calling the parent's: it would assign `keys` and `values`, which are computed here
        self.layer_idx = layer_idx
        self._config = config
        self._fold = config.build()
        self._padding = padding
        self._new_storage = storage
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.seen = 0
        self.num_slots = 0
        self.num_merged: Tensor | None = None
        self.num_dropped: Tensor | None = None
        self.record_past = False
        self._drafting = False  # a recorded prompt was cropped, so what comes next are drafts and not a prompt
        self._fold_due = False
        self._shape: tuple[int, int] | None = None  # (batch, KV heads)
        self._dims: tuple[int, int] | None = None  # head dimensions of keys and values
        self._storage = self._new_storage()
        self._slot_positions: Tensor | None = None
        self._slot_log_mass: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # What is stored ---------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:
        """`[B, H, S, D]` stored keys, slots then tail, in full precision; `None` before the first update."""
        return self._storage.read()[0] if self.num_stored else None

    @property
    def values(self) -> Tensor | None:
        """`[B, H, S, D]`, like `keys`."""
        return self._storage.read()[1] if self.num_stored else None

    @property
    def batch(self) -> int | None:
        """Rows of the batch; `None` before the first update."""
        return None if self._shape is None else self._shape[0]

    @property
    def num_stored(self) -> int:
        """S, the slots and the tail together."""
        return self._storage.length

    @property
    def positions(self) -> Tensor | None:
        """`[B, H, S]`, the position in the sequence of each stored key; `None` before the first update."""
        if not self.num_stored:
            return None
        shape = self._shape
        tail_start = self.seen - (self.num_stored - self.num_slots)
        tail = torch.arange(tail_start, self.seen, device=self.device).expand(*shape, -1)
        return tail if self._slot_positions is None else torch.cat([self._slot_positions.long(), tail], dim=2)

    @property
    def log_mass(self) -> Tensor | None:
        """`[B, H, S]`, what is added to each slot's attention logits; `None` where there is nothing to add."""
        if self._slot_log_mass is None:
            return None
        tail = self.num_stored - self.num_slots
        return torch.nn.functional.pad(self._slot_log_mass, (0, tail))

    @property
    def nbytes(self) -> int:
        """Bytes this layer holds: keys, values, positions, mass and counts."""
        extra = (self._slot_positions, self._slot_log_mass, self.num_merged, self.num_dropped)
        return self._storage.nbytes + sum(tensor.nbytes for tensor in extra if tensor is not None)

    @property
    def full_nbytes(self) -> int:
        """Bytes that `DynamicCache` would hold for the tokens seen."""
        if not self.seen:
            return 0
        batch, heads = self._shape
        return batch * heads * self.seen * sum(self._dims) * self.dtype.itemsize

    # Growing and folding ----------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values `[B, H, q, D]` of a pass, fold if it is time, return all that the pass attends to.

        What is returned is never folded by this pass's own tokens: a prompt attends to itself in full.

        Raises:
            ValueError: for an empty pass, another batch size or shape than what is stored, or states that cannot be
                folded. Nothing is stored then.
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        if new == 1 and not self.record_past:
            self._fold_if_due()
        if new > 1 and self._folds_after_pass(new):
            keys, values = self._with_stored(key_states, value_states)
            slots = self._folded(keys, values, self.seen + new)
            self._count(key_states, value_states)
            self._replace(slots)
            return keys, values

        self._storage.append(key_states, value_states)
        self._count(key_states, value_states)
        if new > 1 and self._waits_to_fold:
            self._fold_due = True
        keys, values = self._storage.read()
        if not self._fold_due and not self.record_past:
            self._storage.settle()
        return keys, values

    def _count(self, keys: Tensor, values: Tensor) -> None:
        self.seen += keys.shape[2]
        self._shape = (keys.shape[0], keys.shape[1])
        self._dims = (keys.shape[3], values.shape[3])

    def _folds_after_pass(self, length: int) -> bool:
        """Whether a pass of several tokens is folded at its end."""
        now = self._config.fold_at == "prefill" and not self.record_past
        return now and self._config.num_slots(self.seen + length) < self.num_stored + length

    @property
    def _waits_to_fold(self) -> bool:
        """Whether a pass of several tokens is folded later, as a prompt is and drafts are not."""
        return not self._drafting if self.record_past else self._config.fold_at == "decode"

    @property
    def _slots_when_due(self) -> int:
        """How many tokens are stored once the fold that is due, if one is, has been done."""
        return min(self.num_stored, self._config.num_slots(self.seen)) if self._fold_due else self.num_stored

    def _fold_if_due(self) -> None:
        if self._slots_when_due < self.num_stored:
            self._replace(self._folded(*self._storage.read(), self.seen))
        self._fold_due = False

    def _with_stored(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.num_stored:
            # the layout that DynamicCache returns: another one may mean another kernel and other last bits
            return keys.contiguous(), values.contiguous()
        stored_keys, stored_values = self._storage.read()
        return torch.cat([stored_keys, keys], dim=2), torch.cat([stored_values, values], dim=2)

    def _folded(self, keys: Tensor, values: Tensor, seen: int) -> Slots:
        """Fold `[B, H, L, D]` states, the last of which is token `seen - 1`; changes nothing here."""
        new = keys.shape[2] - self.num_stored
        positions = torch.arange(seen - new, seen, device=keys.device).expand(*keys.shape[:2], -1)
        log_mass = self.log_mass
        if self.num_stored:
            positions = torch.cat([self.positions, positions], dim=2)
            log_mass = None if log_mass is None else torch.nn.functional.pad(log_mass, (0, new))
        self._check_mergeable(keys, values)
        self._padding.warn_if_unknown(keys)
        # padding is evicted from all heads alike, so one head's positions tell
        padding = self._padding.of_tokens(positions[:, 0])
        states = LayerStates(keys, values, positions, log_mass, padding, layer_idx=self.layer_idx)
        with torch.no_grad():
            return self._fold(states, self._config.num_slots(seen))

    def _replace(self, slots: Slots) -> None:
        """Store folded slots in place of everything."""
        self._storage.replace(slots.keys, slots.values)
        self.num_slots = slots.keys.shape[2]
        self._slot_positions = slots.positions.int()  # 4 bytes a slot; a view of 8 would count against small heads
        self._slot_log_mass = slots.log_mass
        first = self.num_merged is None
        self.num_merged = slots.num_merged if first else self.num_merged + slots.num_merged
        self.num_dropped = slots.num_dropped if first else self.num_dropped + slots.num_dropped

    # What transformers is told ----------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens seen: positions and masks count these, whatever is stored."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """`(stored + query_length, seen - stored)`: keys in the next pass, and how many columns of the mask to skip."""
        folds_first = query_length == 1 and not self.record_past
        stored = self._slots_when_due if folds_first else self.num_stored
        return stored + query_length, self.seen - stored

    def activate_past_recording(self) -> None:
        """Fold nothing until the next `crop`, so that tokens appended from here on can be taken back."""
        self.record_past = True
        self._drafting = False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the layer back as it was: not once tokens were folded, unless the past is recorded."""
        return self.record_past or self.num_slots == 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (0 or negative); then fold what was waiting for it.

        Raises:
            ValueError: if it would reach into slots that stand for several tokens, or for a positive number where the
                installed transformers no longer takes one.
        """
        remove = self.check_crop(tokens_to_remove)
        if not self.num_stored:
            return
        self._storage.truncate(self.num_stored - remove)
        self.seen -= remove
        if self.record_past:
            self._drafting = True
            self._fold_if_due()
            self._storage.settle()

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens `crop(tokens_to_remove)` removes; raises what it would raise."""
        if tokens_to_remove > 0 and not CROP_TAKES_LENGTH:
            raise ValueError(f"crop({tokens_to_remove}) is not supported: give a negative number of tokens to remove")
        remove = max(0, self.seen - tokens_to_remove) if tokens_to_remove > 0 else -int(tokens_to_remove)
        tail = self.num_stored - self.num_slots
        if remove > tail and self.num_stored:  # an unused layer has nothing to give back
            if self.num_slots == 0:
                raise ValueError(f"cannot crop {remove} tokens: layer {self.layer_idx} has seen only {self.seen}")
            raise ValueError(
                f"cannot crop {remove} tokens from layer {self.layer_idx}: only the last {tail} are stored as they "
                f"came, the {self.seen - tail} before them were folded into {self.num_slots} slots. Call "
                "cache.activate_past_recording() before the pass that you want to take back, or reset() and start anew"
            )
        return remove

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
            self._select_rows(torch.arange(self._shape[0], device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`, given as integers or as a bool mask."""
        if self.num_stored:
            self._select_rows(torch.arange(self._shape[0], device=self.device)[indices])

    def _select_rows(self, indices: Tensor) -> None:
        if not self.num_stored:
            return
        self._storage.select_rows(indices)
        self._shape = (len(indices), self._shape[1])
        for name in ("_slot_positions", "_slot_log_mass", "num_merged", "num_dropped"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, indices.to(tensor.device)))

    def offload(self) -> None:
        """Move keys and values to the CPU; positions, a few bytes a slot, stay."""
        if self.num_stored:
            self._storage.to("cpu")

    def prefetch(self) -> None:
        """Move keys and values back."""
        if self.num_stored:
            self._storage.to(self.device)

    # Guards -----------------------------------------------------------------------------------------------------------

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"layer {self.layer_idx} got keys {tuple(keys.shape)} and values {tuple(values.shape)}; expected "
                "(batch, kv_heads, tokens, head_dim) each"
            )
        if keys.shape[2] == 0:
            raise ValueError(
                f"layer {self.layer_idx} got no new tokens. generate() slices off the {self.seen} tokens this cache "
                "has seen: pass the whole conversation, or new tokens with an attention_mask over all of it, or reset()"
            )
        if not self.num_stored:
            return
        if keys.shape[0] != self._shape[0]:
            raise ValueError(
                f"layer {self.layer_idx} holds a batch of {self._shape[0]} rows, but got {keys.shape[0]}; use a new "
                "cache or reset() for another batch, batch_repeat_interleave() to go on with several copies of it"
            )
        if keys.shape[1] != self._shape[1] or (keys.shape[3], values.shape[3]) != self._dims:
            raise ValueError(
                f"layer {self.layer_idx} holds {self._shape[1]} KV heads with dimensions {self._dims} (keys, values), "
                f"but got {keys.shape[1]} with {(keys.shape[3], values.shape[3])}; is this cache from another model?"
            )

    def _check_mergeable(self, keys: Tensor, values: Tensor) -> None:
        if self._fold.merger.merges_values and keys.shape[3] != values.shape[3]:
            raise ValueError(
                f"layer {self.layer_idx} caches keys {tuple(keys.shape)} and values {tuple(values.shape)}: widths "
                "that differ are those of multi-head latent attention (MLA), whose values carry rotary positions and "
                "must not be averaged. Use merger='drop'"
            )
