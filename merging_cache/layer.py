"""MergingLayer: one attention layer's slots and tail, when they are folded, and their geometry for transformers.

Stored keys and values are the slots of the last fold followed by the tail, the tokens appended since. Knows nothing of
how tokens are scored, chosen and merged (`fold.py`) or of the precision they are stored in (`storage.py`).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .attention import Pass
from .config import MergingConfig
from .fold import Fold
from .link import Link
from .mergers import Merger
from .observed import Observed, Owner
from .padding import Padding
from .ragged import RaggedLayout, RaggedStorage
from .rotary import Rotary, rotary_of
from .states import ABSENT, DROPPED, LayerStates, Slots
from .storage import DenseStorage

# up to transformers 5.14 a positive argument of `crop` was the length to crop to; since, only negative ones are allowed
CROP_TAKES_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


class MergingLayer(DynamicLayer):
    """A full-attention layer that folds.

    Attributes:
        seen: tokens seen, folded ones included.
        num_slots: slots per head left by the last fold (of the head that has most); what is stored beyond them is the
            tail.
        num_merged, num_dropped: `[B, H]`, tokens evicted so far that were folded into a survivor, and that were not.
        holders: `[B, H, P]`, where the cache traces, for every position of a row before the last fold (padding not
            counted) that of the slot that holds its token now: its own for survivors, else `DROPPED` or `ABSENT`.
    """

    def __init__(
        self,
        config: MergingConfig,
        fold: Fold,
        padding: Padding,
        link: Link,
        layer_idx: int,
        layer_rank: tuple[int, int] | None = None,
        storage: Callable[[], DenseStorage] = DenseStorage,
        traced: bool = False,
    ) -> None:
        # not calling the parent's: it would assign `keys` and `values`, which are computed here
        self.layer_idx = layer_idx
        self.layer_rank = layer_rank
        self._config = config
        self._fold = fold
        self._padding = padding
        self._link = link
        self._new_storage = storage
        self._traced = traced
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.seen = 0
        self.num_slots = 0
        self.num_merged: Tensor | None = None
        self.num_dropped: Tensor | None = None
        self.holders: Tensor | None = None
        self.record_past = False
        self._is_offloaded = False
        self._drafting = False  # a recorded prompt was cropped, so what comes next are drafts and not a prompt
        self._fold_due = False
        self._awaits_attention = False  # of the last pass
        self._prompt: tuple[Tensor, Tensor] | None = None  # keys and values of a pass whose attention is to be observed
        self._observed = Observed()
        self._shape: tuple[int, int] | None = None  # (batch, KV heads)
        self._dims: tuple[int, int] | None = None  # head dimensions of keys and values
        self._storage = self._new_storage()
        self._slot_positions: Tensor | None = None  # [B, H, S], or [N] where heads differ
        self._slot_log_mass: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # What is stored ---------------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:
        """`[B, H, S, D]` stored keys, slots then tail, in full precision; `None` before the first update.

        Where heads differ and this one has no slot (`positions` is -1), what stands here means nothing.
        """
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
    def _layout(self) -> RaggedLayout | None:
        """Where the slots lie if heads have different numbers of them."""
        return self._storage.layout if isinstance(self._storage, RaggedStorage) else None

    def _of_slots(self, stored: Tensor, fill: float) -> Tensor:
        """`[B, H, S]`, what is stored for each slot, with `fill` where a head has none."""
        return stored if self._layout is None else self._layout.pad(stored, fill)

    @property
    def slots_per_head(self) -> Tensor | None:
        """`[B, H]`, how many slots each head has; `None` before the first update."""
        if not self.num_stored:
            return None
        if self._layout is not None:
            return self._layout.lengths
        return torch.full(self._shape, self.num_slots, device=self.device)

    @property
    def stored_per_head(self) -> Tensor | None:
        """`[B, H]`, how many tokens each head stores, slots and tail; `None` before the first update."""
        return None if not self.num_stored else self.slots_per_head + (self.num_stored - self.num_slots)

    @property
    def positions(self) -> Tensor | None:
        """`[B, H, S]`, the position in the sequence of each stored key, -1 where heads differ and this one has no slot.

        `None` before the first update.
        """
        if not self.num_stored:
            return None
        tail_start = self.seen - (self.num_stored - self.num_slots)
        tail = torch.arange(tail_start, self.seen, device=self.device).expand(*self._shape, -1)
        if self._slot_positions is None:
            return tail
        return torch.cat([self._of_slots(self._slot_positions, -1).long(), tail], dim=2)

    @property
    def log_mass(self) -> Tensor | None:
        """`[B, H, S]`, what is added to each slot's attention logits; `None` where there is nothing to add."""
        if self._slot_log_mass is None:
            return None
        tail = self.num_stored - self.num_slots
        return torch.nn.functional.pad(self._of_slots(self._slot_log_mass, 0.0), (0, tail))

    @property
    def merger(self) -> Merger | None:
        """What becomes of the tokens that this layer evicts; `None` where it evicts none."""
        return None if self._config.compression_ratio == 0 else self._fold.merger

    @property
    def nbytes(self) -> int:
        """Bytes this layer holds: keys, values, positions, mass, counts, and what it observed."""
        counts = (self.num_merged, self.num_dropped, self.holders)
        extra = (self._slot_positions, self._slot_log_mass, *counts, self._observed)
        return self._storage.nbytes + sum(part.nbytes for part in extra if part is not None)

    @property
    def full_nbytes(self) -> int:
        """Bytes that `DynamicCache` would hold for the tokens seen."""
        if not self.seen:
            return 0
        batch, heads = self._shape
        return batch * heads * self.seen * sum(self._dims) * self.dtype.itemsize

    def fates(self, row: int) -> Tensor:
        """`[H, n]`, what became of each of the n tokens of a row, padding left out; see `picture.Fates`."""
        positions = self._padding.row_positions(self.positions)[row]  # [H, S], negative where there is no slot
        fates = torch.full((self._shape[1], int(positions.max()) + 1), ABSENT, device=positions.device)
        if self.holders is not None:
            fates[:, : self.holders.shape[2]] = self.holders[row, :, : fates.shape[1]].long()
        for of_head, stored in zip(fates, positions, strict=True):
            stored = stored[stored >= 0]
            of_head[stored] = stored
        return fates

    # Growing and folding ----------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values `[B, H, q, D]` of a pass, fold if it is time, return all that the pass attends to.

        What is returned is never folded by this pass's own tokens: a prompt attends to itself in full. Where the model
        is linked, the fold waits until that attention is done (see `attended`).

        Raises:
            ValueError: for an empty pass, another batch size or shape than what is stored, or states that cannot be
                folded. Nothing is stored then. Also if an earlier pass did not bring what the fold needs.
        """
        self._check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self._miss_attention()
        if not self.record_past and (new == 1 or self._config.fold_at == "prefill"):
            self._fold_if_due()
        if self._has_fitted_slots:
            self._check_link()
        before = self.num_stored
        if before:
            self._storage.append(key_states, value_states)
        else:
            # the layout that DynamicCache returns: another one may mean another kernel and other last bits
            self._storage.hold(key_states.contiguous(), value_states.contiguous())
        self.seen += new
        self._shape = (key_states.shape[0], key_states.shape[1])
        self._dims = (key_states.shape[3], value_states.shape[3])
        is_prompt = (new > 1 or before == 0) and not self._drafting  # the first token of all is a prompt, too
        keys, values = self._storage.read()
        is_prompt = is_prompt and self._config.compression_ratio != 0
        if is_prompt and self._fold.is_due(self.num_stored, self.seen, self._config.num_slots(self.seen)):
            self._fold_due = True
        is_observed = is_prompt and self._link.expected
        if is_observed or self._has_fitted_slots:
            self._awaits_attention = True
            self._prompt = (keys, values) if is_observed else None
            Pass(self, self.layer_idx, keys.shape[2], *self._fitted_slots()).announce(keys)
        if is_observed:
            return keys, values
        if self._fold_due and not self.record_past and self._config.fold_at == "prefill":
            try:
                self._fold_if_due(keys, values)
            except Exception:
                self._take_back(before, new)
                raise
        elif not self._fold_due and not self.record_past and (new == 1 or self._config.fold_at == "prefill"):
            self._storage.settle()
        return keys, values

    @property
    def _has_fitted_slots(self) -> bool:
        """Whether there are slots for which transformers' mask has to be fitted: it is made for another layer's."""
        return self.num_slots > 0 and (self._fold.fits_masks or self._slot_log_mass is not None)

    def _fitted_slots(self) -> tuple[int, Tensor | None]:
        """How many slots the mask has to be fitted to, and `[B, H, S]`, what is added to their attention logits."""
        if not self._has_fitted_slots:
            return 0, None
        if self._layout is None and self._slot_log_mass is None:
            return self.num_slots, None
        bias = torch.zeros((*self._shape, self.num_slots), device=self.device)
        if self._slot_log_mass is not None:
            bias = self._of_slots(self._slot_log_mass, 0.0).float()
        if self._layout is not None:
            bias = bias.masked_fill(~self._layout.valid, torch.finfo(self.dtype).min)
        return self.num_slots, bias

    def attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        module: torch.nn.Module,
        scaling: float | None,
        hidden_states: Tensor | None,
    ) -> None:
        """The attention of the last pass is done: observe its queries, and fold if it is time.

        Args:
            query: `[B, Hq, q, D]`, after RoPE.
            key, value: what the attention was given.
            visible: `[B, L]` bool, the keys that are not padding, or `None` where none is.
            module, scaling: the attention module and its factor on the logits.
            hidden_states: `[B, q, hidden]`, the module's input, where someone asked for it.
        """
        prompt, self._prompt, self._awaits_attention = self._prompt, None, False
        if prompt is None:
            return
        keys, values = prompt
        new = query.shape[2]
        if self._fold.fits_masks and key.shape[1] != keys.shape[1]:
            raise ValueError(
                f"layer {self.layer_idx} of {self._link.model_name} caches {keys.shape[1]} KV heads but attends to "
                f"{key.shape[1]}, in an order of its own, so nothing can be added to the logits of one head; choose "
                "budget='uniform' and a merger without mass, such as 'similarity'"
            )
        self._padding.observe(None if visible is None else ~visible[:, -new:], self.seen - new, query.shape[0])
        self._meet(module, scaling, hidden_states)
        if self._fold.observes:
            with self._in_full_precision():
                queries = self._by_stored_head(query.detach(), key, keys)
                self._observed.receive(queries, self.seen - new, hidden_states)
                if not self.record_past:
                    self._observed.digest(self._fold, self._states(keys, values))
        if not self.record_past and self._config.fold_at == "prefill":
            try:
                self._fold_if_due(keys, values)
            except Exception:
                self._take_back(self.num_stored - new, new)
                raise
            self._storage.settle()

    @contextmanager
    def _in_full_precision(self) -> Iterator[None]:
        """Scores are computed in fp32 and without gradients, whatever the model runs in."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield

    def _meet(self, module: torch.nn.Module, scaling: float | None, hidden_states: Tensor | None) -> None:
        """Note which attention module this is, and check that it gives what the stages need."""
        stages = self._fold.stages.values()
        if module is not self._observed.owner.module:
            self._observed.owner = Owner(module, self._rotary_of(module))
        self._observed.scaling = scaling
        if hidden_states is None and any(stage.needs_hidden_states for stage in stages):
            raise ValueError(
                f"{self._fold.scorer.stage_name} must see the hidden states of {self._link.model_name}, but layer "
                f"{self.layer_idx} was given none. Give the cache the model, {self._link.cache_name}(model=model, ...)"
            )

    def _rotary_of(self, module: torch.nn.Module) -> Rotary | None:
        """The module's rotary embedding, if a stage asks for it."""
        stages = self._fold.stages.values()
        if any(stage.needs_rotary for stage in stages):
            return rotary_of(module)
        if any(stage.uses_rotary for stage in stages):
            with suppress(ValueError):
                return rotary_of(module)
        return None

    def _by_stored_head(self, query: Tensor, key: Tensor, stored: Tensor) -> Tensor:
        """The query heads in the order of the stored KV heads that they read.

        They come that way, unless the model computes other keys `key` from the `stored` ones before it attends.
        """
        if key.shape == stored.shape:
            return query
        if key.shape[1] % stored.shape[1] == 0 and key.shape[2:] == stored.shape[2:]:
            # heads repeated in an order of the model's own: the keys of the last token tell which is which
            same = (key[0, :, None, -1] == stored[0, None, :, -1]).all(dim=-1)  # [attended heads, stored heads]
            if bool((same.sum(dim=1) == 1).all()):
                order = same.int().argmax(dim=1).repeat_interleave(query.shape[1] // key.shape[1])
                return query[:, order.argsort(stable=True)]
        raise ValueError(
            f"layer {self.layer_idx} of {self._link.model_name} caches keys {tuple(stored.shape)} but attends to keys "
            f"{tuple(key.shape)} that it computes from them (as multi-head latent attention does), so its queries "
            "cannot be compared with what is cached; choose a scorer that needs keys and values only, such as "
            "scorer='keydiff'"
        )

    def _miss_attention(self) -> None:
        """Go on without an attention that never came, if that is possible."""
        if self._awaits_attention and self._link.needed:
            stages = [stage for stage in self._fold.stages.values() if stage.needs_attention]
            names = " and ".join(stage.stage_name for stage in stages)
            raise ValueError(
                f"{names} must see the attention of {self._link.model_name}, but layer {self.layer_idx} was told of "
                f"none. Give the cache the model, {self._link.cache_name}(model=model, ...), or generate inside `with "
                "merging_attention(model):`. If you did, this model's attention does not go through transformers' "
                "attention interface (or its attention implementation was changed since): choose stages that need keys "
                "and values only, such as scorer='keydiff' and budget='uniform'"
            )
        self._prompt, self._awaits_attention = None, False

    def _take_back(self, stored: int, new: int) -> None:
        """Undo the append of a pass of `new` tokens."""
        self._storage.truncate(stored)
        self.seen -= new
        self._fold_due = False

    @property
    def _slots_when_due(self) -> int:
        """How many tokens are stored once the fold that is due, if one is, has been done.

        Where layers differ this is not known before, and need not be: masks are fitted to each layer then.
        """
        if not self._fold_due:
            return self.num_stored
        padding = self._padding.of_tokens(self.positions[:, 0])
        return min(self.num_stored, self._fold.width(padding, self._config.num_slots(self.seen)))

    def _fold_if_due(self, *stored: Tensor) -> None:
        """Fold what is stored, if that is due; `stored` are its keys and values where they are at hand."""
        if self._fold_due:
            self._replace(self._folded(*(stored or self._storage.read())))
        self._fold_due = False

    def finish(self) -> None:
        """Fold if that is due, since only single tokens follow, and check that they need nothing but keys and values.

        Raises:
            ValueError: for an empty layer, one that records the past, or slots that only the linked attention can read.
        """
        if not self.num_stored or self.record_past:
            state = "records the past for drafts" if self.record_past else "has not seen a prompt"
            raise ValueError(f"layer {self.layer_idx} {state}, so it cannot be fixed; prefill first, without drafts")
        self._miss_attention()
        self._fold_if_due()
        if self._has_fitted_slots:
            raise ValueError(
                f"layer {self.layer_idx} has heads of different lengths, or slots with mass, which only the linked "
                "attention can read, so it cannot be fixed; use budget='uniform' and a merger without mass, such as "
                "'similarity'"
            )

    def _states(self, keys: Tensor, values: Tensor) -> LayerStates:
        """Everything that is stored and was observed, with positions that do not count padding."""
        positions, log_mass, valid = self.positions, self.log_mass, None
        # padding is evicted from all heads alike, so one head's positions tell
        padding = self._padding.of_tokens(positions[:, 0])
        if self._layout is not None:
            tail = self.num_stored - self.num_slots
            valid = torch.nn.functional.pad(self._layout.valid, (0, tail), value=True)
            if padding is not None:
                padding[:, : self.num_slots] = False  # none is among ragged slots
                padding = padding if padding.any() else None
        observed, query_positions = self._observed, None
        if observed.queries is not None:
            query_positions = self._padding.row_positions(observed.positions)
        return LayerStates(
            keys=keys,
            values=values,
            positions=self._padding.row_positions(positions),
            log_mass=log_mass,
            padding=padding,
            valid=valid,
            queries=observed.queries,
            query_positions=query_positions,
            hidden_states=observed.hidden_states,
            remembered={name: one.resized(self.num_stored) for name, one in observed.remembered.items()},
            module=observed.owner.module,
            rotary=observed.owner.rotary,
            scaling=observed.scaling,
            layer_idx=self.layer_idx,
            layer_rank=self.layer_rank,
            traced=self._traced,
            known_seen=None if self._padding.is_there else self.seen,
        )

    def _folded(self, keys: Tensor, values: Tensor) -> Slots:
        """Fold what is stored; changes nothing here."""
        self._check_mergeable(keys, values)
        self._check_owner()
        self._padding.warn_if_unknown(keys)
        with self._in_full_precision():
            slots = self._fold(self._states(keys, values), self._config.num_slots(self.seen))
        return replace(slots, positions=self._padding.sequence_positions(slots.positions))

    def _replace(self, slots: Slots) -> None:
        """Store folded slots in place of everything."""
        self._slot_positions = slots.positions.int()  # 4 bytes a slot; a view of 8 would count against small heads
        log_mass = slots.log_mass if slots.log_mass is not None and slots.log_mass.any() else None
        self._slot_log_mass = log_mass
        if slots.valid is None:
            if self._layout is not None:
                self._storage = self._new_storage()
            self._storage.replace(slots.keys, slots.values)
        else:
            layout = RaggedLayout.of_valid(slots.valid)
            self._storage = RaggedStorage(self._new_storage, layout, slots.keys, slots.values)
            self._slot_positions = self._slot_positions[slots.valid]
            self._slot_log_mass = None if log_mass is None else log_mass[slots.valid]
        self._observed.settle(self._fold, slots)
        self.num_slots = slots.keys.shape[2]
        first = self.num_merged is None
        self.num_merged = slots.num_merged if first else self.num_merged + slots.num_merged
        self.num_dropped = slots.num_dropped if first else self.num_dropped + slots.num_dropped
        if slots.holders is not None:
            self.holders = handed_on(self.holders, slots.holders)

    # What transformers is told ----------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens seen: positions and masks count these, whatever is stored."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """`(stored + query_length, seen - stored)`: keys in the next pass, and how many columns of the mask to skip."""
        folds_first = not self.record_past and (query_length == 1 or self._config.fold_at == "prefill")
        stored = self._slots_when_due if folds_first else self.num_stored
        return stored + query_length, self.seen - stored

    def activate_past_recording(self) -> None:
        """Fold nothing until the next `crop`, so that tokens appended from here on can be taken back."""
        self.record_past = True
        self._drafting = False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the layer back as it was, unless the past is recorded: not once tokens were folded.

        Nor once a stage has observed them, since what it remembers of all queries cannot be undone.
        """
        return self.record_past or (self.num_slots == 0 and self._observed.until == 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens (0 or negative); then fold what was waiting for it.

        Raises:
            ValueError: if it would reach into slots that stand for several tokens, or for a positive number where the
                installed transformers no longer takes one.
        """
        remove = self.check_crop(tokens_to_remove)
        if not self.num_stored:
            return
        self._miss_attention()
        if self._is_offloaded:
            self.prefetch()
        self._storage.truncate(self.num_stored - remove)
        self.seen -= remove
        self._observed.truncate(self.seen, self.num_stored)
        if self.record_past:
            self._drafting = True
            if self._fold.observes and self._observed.new:
                with self._in_full_precision():
                    self._observed.digest(self._fold, self._states(*self._storage.read()))
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
        if self.num_stored and self.seen - remove < self._observed.until:
            raise ValueError(
                f"cannot crop {remove} tokens from layer {self.layer_idx}: {self._observing} observed "
                f"the queries of the first {self._observed.until} of {self.seen} tokens, which cannot be undone. Call "
                "cache.activate_past_recording() before the pass that you want to take back, or reset() and start anew"
            )
        return remove

    def release(self) -> None:
        """Forget the attention module, so that this cache does not keep the model alive."""
        self._observed.owner = self._observed.owner.forgotten()

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
        left = self._storage.select_rows(indices)
        self._shape = (len(indices), self._shape[1])
        self._observed.select_rows(indices)
        for name in ("_slot_positions", "_slot_log_mass", "num_merged", "num_dropped", "holders"):
            tensor = getattr(self, name)
            rows = indices
            if self._layout is not None and name.startswith("_slot"):
                rows = left  # slots that rows may share, in storage order
            if tensor is not None and rows is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))

    def offload(self) -> None:
        """Move keys and values to the CPU; positions, a few bytes a slot, stay."""
        if self.num_stored:
            self._storage.to("cpu")
            self._is_offloaded = True

    def prefetch(self) -> None:
        """Move keys and values back."""
        if self.num_stored:
            self._storage.to(self.device)
            self._is_offloaded = False

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

    def _check_link(self) -> None:
        """Refuse a pass that cannot read this layer's slots, or did not read those of the layer before."""
        if self._link.is_broken:
            raise ValueError(
                f"layer {self.layer_idx} has slots that only the linked attention of {self._link.model_name} can read "
                "(heads of different lengths, or slots with mass), but it is not linked any more. Go on before "
                f"release() or inside `with merging_attention(model):`, or make a new {self._link.cache_name}"
            )
        if (other := self._link.reads(self)) is not None:
            other._miss_attention()  # the first layer whose slots nobody read stops the pass that it spoils

    @property
    def _observing(self) -> str:
        """The names of the stages that observe."""
        return " and ".join(stage.stage_name for stage in self._fold.stages.values() if stage.observes)

    def _check_owner(self) -> None:
        """Refuse to fold a prompt by what can no longer be known of the module that it went through."""
        stages, owner = self._fold.stages.values(), self._observed.owner
        if (owner.lost_module and any(stage.needs_module for stage in stages)) or (
            owner.lost_rotary and any(stage.uses_rotary or stage.needs_rotary for stage in stages)
        ):
            raise ValueError(
                f"layer {self.layer_idx} holds a prompt that waits for its fold, but the cache was pickled or released "
                f"since, and {self._observing} cannot go on without the attention module of {self._link.model_name}. "
                "Pickle or release the cache after the fold: use fold_at='prefill', or generate a token first"
            )

    def _check_mergeable(self, keys: Tensor, values: Tensor) -> None:
        if self._fold.merger.merges_values and keys.shape[3] != values.shape[3]:
            raise ValueError(
                f"layer {self.layer_idx} caches keys {tuple(keys.shape)} and values {tuple(values.shape)}: widths "
                "that differ are those of multi-head latent attention (MLA), whose values carry rotary positions and "
                "must not be averaged. Use merger='drop'"
            )


def handed_on(before: Tensor | None, now: Tensor) -> Tensor:
    """`Slots.holders` over two folds, of which the second knows the slots of the first by their positions."""
    if before is None:
        return now.int()
    handed = now.gather(2, before.long().clamp_min(0)).masked_fill(before < 0, DROPPED)
    new = torch.ones_like(now, dtype=torch.bool)  # tokens that came since; a row may have had fewer than the others
    new[..., : before.shape[2]] = before == ABSENT
    return torch.where(new, now, torch.nn.functional.pad(handed, (0, now.shape[2] - before.shape[2]))).int()
