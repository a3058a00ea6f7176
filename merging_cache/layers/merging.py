"""MergingLayer: when one attention layer is folded, and what transformers is told.

Knows nothing of how it is folded (`folding.py`), of where tokens lie (`storage/`), or of the words in which it refuses
(`guards.py`).
"""

import copy
from typing import Any

import torch
from torch import Tensor

from ..model import Pass
from .folding import FoldingLayer
from .observed import Observed, by_stored_head


class MergingLayer(FoldingLayer):
    """A full-attention layer that folds, once a prompt was read."""

    def _clear(self) -> None:
        super()._clear()
        self.record_past = False
        self._drafting = False  # a recorded prompt was cropped, so what comes next are drafts and not a prompt
        self._awaits_attention = False  # of the last pass
        # keys and values stored after a pass whose attention is to be observed, and how many tokens it had
        self._prompt: tuple[Tensor, Tensor, int] | None = None

    # Growing ----------------------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values `[B, H, q, D]` of a pass, fold if it is time, return all that the pass attends to.

        What is returned is never folded by this pass's own tokens: a prompt attends to itself in full. Where the model
        is linked, the fold waits until that attention is done (see `attended`).

        Raises:
            ValueError: for an empty pass, another batch size or shape than what is stored, or states that cannot be
                folded. Nothing is stored then. Also if an earlier pass did not bring what the fold needs.
        """
        config, fold = self._shared.config, self._shared.fold
        self.guards.check_pass(key_states, value_states, self.shape if self.num_stored else None, self.seen)
        new = key_states.shape[2]
        if not self.is_initialized:
            if not self._shared.link.expected:
                self._shared.padding.check_width(new)
            self.lazy_initialization(key_states, value_states)
        self._miss_attention()
        if self.folds_before(new):
            self.fold_if_due()
        if self._has_fitted_slots:
            self._check_read()
        is_prompt = new > 1 or not self.num_stored  # the first token of all is a prompt, too
        is_prompt = is_prompt and not self._drafting and config.compression_ratio != 0
        self.append(key_states, value_states)
        keys, values = self.storage.read()
        if is_prompt and fold.is_due(self.num_stored, self.seen, config.num_slots(self.seen)):
            self.fold_is_due = True
        is_observed = is_prompt and self._shared.link.expected
        if is_observed or self._has_fitted_slots:
            self._awaits_attention = True
            self._prompt = (keys, values, new) if is_observed else None
            Pass(self, self.layer_idx, keys.shape[2], *self.fitted_slots()).announce(keys)
        if not is_observed:
            self._end_pass(new, keys, values, self._observed)
        return keys, values

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
        (keys, values, told), fold, new = prompt, self._shared.fold, query.shape[2]
        self.guards.check_attends_to_itself(new, told, module)
        before = copy.copy(self._observed)
        self.guards.check_attended_heads(key.shape[1], keys.shape[1])
        padding = None if visible is None else ~visible[:, -new:]
        self._shared.padding.observe(padding, self.seen - new, query.shape[0])
        self._observed.meet(module, scaling, fold, query)
        self.guards.check_hidden_states(hidden_states)
        if fold.observes:
            with self._in_full_precision():
                queries = by_stored_head(query.detach(), key, keys)
                self.guards.check_comparable(queries, key, keys)
                self._observed.receive(queries, self.seen - new, hidden_states)
                if not self.record_past:
                    self._observed.digest(fold, self._states(keys, values))
        self._end_pass(new, keys, values, before)

    def _end_pass(self, new: int, keys: Tensor, values: Tensor, before: Observed) -> None:
        """After a pass of `new` tokens: fold if that is due now, or let what is stored settle.

        Args:
            new: how many tokens it had.
            keys, values: all that is stored.
            before: what was observed before it, which is all that stays if the fold is refused.
        """
        if self.fold_is_due and not self.record_past and self._shared.config.fold_at == "prefill":
            self._last_pass = new, before
            try:
                self.fold_with_others(keys, values)
            except Exception:
                self.undo_pass()
                raise
        if not self.fold_is_due and self.folds_before(new):
            self.storage.settle()

    def undo_pass(self) -> None:
        """Be as before the last pass, whose fold was refused."""
        (new, self._observed), self.fold_is_due, self.scored = self._last_pass, False, None
        self.take_back(new)

    def folds_before(self, new: int) -> bool:
        """Whether a fold that is due is done no later than before a pass of `new` tokens."""
        return not self.record_past and (new == 1 or self._shared.config.fold_at == "prefill")

    # Attention that the mask of transformers does not fit -------------------------------------------------------------

    @property
    def _has_fitted_slots(self) -> bool:
        """Whether there are slots for which transformers' mask has to be fitted: it is made for another layer's."""
        return self.storage.num_slots > 0 and (self._shared.fold.fits_masks or self.storage.log_mass is not None)

    def fitted_slots(self) -> tuple[int, Tensor | None]:
        """How many slots the mask has to be fitted to, and `[B, H, S]`, what is added to their attention logits."""
        if not self._has_fitted_slots:
            return 0, None
        return self.num_slots, self.storage.bias(torch.finfo(self.dtype).min)

    def _check_read(self) -> None:
        """Refuse a pass that cannot read this layer's slots, or did not read those of the layer before."""
        self.guards.check_linked()
        if (other := self._shared.link.reads(self)) is not None:
            other._miss_attention()  # the first layer whose slots nobody read stops the pass that it spoils

    def _miss_attention(self) -> None:
        """Go on without an attention that never came, if that is possible."""
        if self._awaits_attention:
            self.guards.check_attention_came()
        self._prompt, self._awaits_attention = None, False

    # Folding ----------------------------------------------------------------------------------------------------------

    @property
    def _slots_when_due(self) -> int:
        """How many tokens are stored once the fold that is due, if one is, has been done.

        Where layers differ this is not known before, and need not be: masks are fitted to each layer then.
        """
        if not self.fold_is_due:
            return self.num_stored
        padding = self._shared.padding.of_tokens(self.positions[:, 0])
        width = self._shared.fold.width(padding, self._shared.config.num_slots(self.seen))
        return min(self.num_stored, width)

    def fold(self) -> None:
        """Fold now, if that is due."""
        self._miss_attention()
        self.fold_if_due()

    def finish(self) -> None:
        """Fold if that is due, since only single tokens follow, and check that they need nothing but keys and values.

        Raises:
            ValueError: for an empty layer, one that records the past, or slots that only the linked attention can read.
        """
        self.guards.check_fixable(is_empty=not self.num_stored, records=self.record_past)
        self.fold()
        self.guards.check_plain(self._has_fitted_slots)

    # What transformers is told ----------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens seen: positions and masks count these, whatever is stored."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """`(stored + query_length, seen - stored)`: keys in the next pass, and how many columns of the mask to skip."""
        stored = self._slots_when_due if self.folds_before(query_length) else self.num_stored
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
        self.take_back(remove)
        self._observed.truncate(self.seen, self.num_stored)
        if self.record_past:
            self._drafting = True
            if self._shared.fold.observes and self._observed.new:
                with self._in_full_precision():
                    self._observed.digest(self._shared.fold, self._states(*self.storage.read()))
            self.fold_with_others()
            if not self.fold_is_due:
                self.storage.settle()

    def check_crop(self, tokens_to_remove: int) -> int:
        """How many tokens `crop(tokens_to_remove)` removes; raises what it would raise."""
        if not self.num_stored:  # an unused layer has nothing to give back
            return self.guards.removed(tokens_to_remove, self.seen)
        slots, tail, observed = self.num_slots, self.num_tail, self._observed.until
        return self.guards.check_crop(tokens_to_remove, self.seen, slots, tail, observed)
