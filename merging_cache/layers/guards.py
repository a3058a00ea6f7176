"""What a layer refuses, and in which words: passes, folds and crops that could not be right.

Knows what a layer was given; changes nothing.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .observed import Owner
from .shared import Shared
from .stored import Shape

# up to transformers 5.14 a positive argument of `crop` was the length to crop to; since, only negative ones are allowed
CROP_TAKES_LENGTH = "max_length" in inspect.signature(DynamicLayer.crop).parameters


def check_histories(seen: Sequence[int]) -> None:
    """Refuse to go on where an earlier pass stopped halfway: layers have seen different numbers of tokens."""
    different = set(seen)
    if len(different) > 1:
        raise ValueError(
            "an earlier pass stopped halfway (interrupted, out of memory, or a hook raised): some layers of this cache "
            f"have seen {max(different)} tokens and others {min(different)}, so what comes next would be wrong. Call "
            "cache.reset(), and read the whole text again"
        )


@dataclass(frozen=True)
class Guards:
    """The refusals of one layer.

    Args:
        layer_idx: its index.
        shared: what it shares with the other layers of its cache.
    """

    layer_idx: int
    shared: Shared

    def check_pass(self, keys: Tensor, values: Tensor, shape: Shape | None, seen: int) -> None:
        """Refuse an empty pass, or one that does not fit the `shape` of what is stored."""
        if keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"layer {self.layer_idx} got keys {tuple(keys.shape)} and values {tuple(values.shape)}; expected "
                "(batch, kv_heads, tokens, head_dim) each"
            )
        if keys.shape[2] == 0:
            raise ValueError(
                f"layer {self.layer_idx} got no new tokens. generate() slices off the {seen} tokens this cache "
                "has seen: pass the whole conversation, or new tokens with an attention_mask over all of it, or reset()"
            )
        if shape is None or (new := Shape.of(keys, values)) == shape:
            return
        if new.batch != shape.batch:
            raise ValueError(
                f"layer {self.layer_idx} holds a batch of {shape.batch} rows, but got {new.batch}; use a new "
                "cache or reset() for another batch, batch_repeat_interleave() to go on with several copies of it"
            )
        raise ValueError(
            f"layer {self.layer_idx} holds {shape.heads} KV heads with dimensions {shape[2:]} (keys, values), "
            f"but got {new.heads} with {new[2:]}; is this cache from another model?"
        )

    def check_linked(self) -> None:
        """Refuse a pass that cannot read slots that only the linked attention can."""
        if self.shared.link.is_broken:
            raise ValueError(
                f"layer {self.layer_idx} has slots that only the linked attention of {self.shared.link.model_name} can "
                "read (heads of different lengths, or slots with mass), but it is not linked any more. Go on before "
                "release() or inside `with merging_attention(model):`, or make a new "
                f"{self.shared.link.cache_name}"
            )

    def check_attention_came(self) -> None:
        """Refuse to go on without the attention of the last pass, where some stage cannot do without it."""
        link = self.shared.link
        if link.needed:
            stages = [stage for stage in self.shared.fold.stages.values() if stage.needs_attention]
            names = " and ".join(stage.stage_name for stage in stages)
            way_out = (
                f"Give the cache the model, {link.cache_name}(model=model, ...), or generate inside "
                "`with merging_attention(model):`"
            )
            if link.was_given_model:
                way_out = (
                    "The cache was given the model, but was released since, or the model's attention implementation "
                    "was changed, or another model ran, or one whose attention does not go through transformers' "
                    "interface: make a new cache, or choose stages that need keys and values only, such as "
                    "scorer='keydiff' and budget='uniform'"
                )
            raise ValueError(
                f"{names} must see the attention of {link.model_name}, but layer {self.layer_idx} was told of none. "
                f"{way_out}"
            )

    def check_attends_to_itself(self, num_queries: int, new: int, module: torch.nn.Module) -> None:
        """Refuse to observe an attention to what an encoder has read."""
        has_encoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        if num_queries != new or (has_encoder and not getattr(module, "is_causal", True)):
            raise ValueError(
                f"layer {self.layer_idx} holds what an encoder has read, to which {type(module).__name__} attends with "
                f"{num_queries} queries to {new} tokens; only what a decoder has read itself can be folded: "
                f"EncoderDecoderCache({self.shared.link.cache_name}(model=model, ...), DynamicCache())"
            )

    def check_hidden_states(self, hidden_states: Tensor | None) -> None:
        """Refuse an attention whose input is not known, where some stage asks for it."""
        fold, link = self.shared.fold, self.shared.link
        if hidden_states is None and fold.needs_hidden_states:
            raise ValueError(
                f"{fold.scorer.stage_name} must see the hidden states of {link.model_name}, but layer "
                f"{self.layer_idx} was given none. Give the cache the model, {link.cache_name}(model=model, ...)"
            )

    def check_attended_heads(self, attended: int, stored: int) -> None:
        """Refuse to fit masks to the `stored` KV heads where the model attends to another number of them."""
        if self.shared.fold.fits_masks and attended != stored:
            raise ValueError(
                f"layer {self.layer_idx} of {self.shared.link.model_name} caches {stored} KV heads but attends to "
                f"{attended}, in an order of its own, so nothing can be added to the logits of one head; choose "
                "budget='uniform' and a merger without mass, such as 'similarity'"
            )

    def check_comparable(self, query: Tensor | None, attended: Tensor, stored: Tensor) -> None:
        """Refuse to observe queries that do not belong to the stored keys; `None` where none were found to."""
        if query is None:
            raise ValueError(
                f"layer {self.layer_idx} of {self.shared.link.model_name} caches keys {tuple(stored.shape)} but "
                f"attends to keys {tuple(attended.shape)} that it computes from them (as multi-head latent attention "
                "does), so its queries cannot be compared with what is cached; choose a scorer that needs keys and "
                "values only, such as scorer='keydiff'"
            )

    def check_owner(self, owner: Owner) -> None:
        """Refuse to fold a prompt by what can no longer be known of the module that it went through."""
        stages = self.shared.fold.stages.values()
        if (owner.lost_module and any(stage.needs_module for stage in stages)) or (
            owner.lost_rotary and any(stage.uses_rotary or stage.needs_rotary for stage in stages)
        ):
            raise ValueError(
                f"layer {self.layer_idx} holds a prompt that waits for its fold, but the cache was pickled or released "
                f"since, and {self._observing} cannot go on without the attention module of "
                f"{self.shared.link.model_name}. Pickle or release the cache after the fold: use fold_at='prefill', or "
                "generate a token first"
            )

    def check_read_again(self, was_read: bool) -> None:
        """Refuse to fold by a second reading that did not take place."""
        if self.shared.is_to_be_read_again and not was_read:
            names = " and ".join(stage.stage_name for stage in self.shared.fold.rereading.values())
            raise ValueError(
                f"{names} has {self.shared.link.model_name} read the prompt again, but it "
                f"is not linked (any more). Give the cache the model, {self.shared.link.cache_name}(model=model, ...), "
                "and fold before it is released or pickled: with fold_at='prefill', or by cache.fold()"
            )

    def check_mergeable(self, shape: Shape) -> None:
        """Refuse to average values that carry positions; what is known by the config was refused before any pass."""
        if self.shared.fold.merger.merges_values and shape.key_dim != shape.value_dim:
            raise ValueError(
                f"layer {self.layer_idx} caches keys of width {shape.key_dim} and values of width {shape.value_dim}: "
                "widths that differ are those of multi-head latent attention (MLA), whose values carry rotary "
                "positions and must not be averaged. Use merger='drop'"
            )

    def check_crop(self, tokens_to_remove: int, seen: int, num_slots: int, tail: int, observed: int) -> int:
        """How many tokens `crop(tokens_to_remove)` takes from a layer that is not empty; refuses what it cannot.

        Args:
            tokens_to_remove: as transformers gives it, 0 or negative; before 5.15 also the length to crop to.
            seen, num_slots, tail: tokens seen, slots per head, and tokens stored behind them as they came.
            observed: of how many tokens the queries were observed.
        """
        remove = self.removed(tokens_to_remove, seen)
        way_out = (
            "Call cache.activate_past_recording() before the pass that you want to take back, or reset() and start anew"
        )
        if remove > tail and num_slots == 0:
            raise ValueError(f"cannot crop {remove} tokens: layer {self.layer_idx} has seen only {seen}")
        if remove > tail:
            raise ValueError(
                f"cannot crop {remove} tokens from layer {self.layer_idx}: only the last {tail} are stored as they "
                f"came, the {seen - tail} before them were folded into {num_slots} slots. {way_out}"
            )
        if seen - remove < observed:
            raise ValueError(
                f"cannot crop {remove} tokens from layer {self.layer_idx}: {self._observing} observed the queries of "
                f"the first {observed} of {seen} tokens, which cannot be undone. {way_out}"
            )
        return remove

    def removed(self, tokens_to_remove: int, seen: int) -> int:
        """How many tokens `crop(tokens_to_remove)` means."""
        if tokens_to_remove > 0 and not CROP_TAKES_LENGTH:
            raise ValueError(f"crop({tokens_to_remove}) is not supported: give a negative number of tokens to remove")
        return max(0, seen - tokens_to_remove) if tokens_to_remove > 0 else -int(tokens_to_remove)

    def check_fixable(self, is_empty: bool, records: bool) -> None:
        """Refuse to fix a layer to which more than single tokens may still come."""
        if is_empty or records:
            state = "records the past for drafts" if records else "has not seen a prompt"
            raise ValueError(f"layer {self.layer_idx} {state}, so it cannot be fixed; prefill first, without drafts")

    def check_plain(self, has_fitted_slots: bool) -> None:
        """Refuse to fix slots that only the linked attention can read."""
        if has_fitted_slots:
            raise ValueError(
                f"layer {self.layer_idx} has heads of different lengths, or slots with mass, which only the linked "
                "attention can read, so it cannot be fixed; use budget='uniform' and a merger without mass, such as "
                "'similarity'"
            )

    @property
    def _observing(self) -> str:
        """The names of the stages that observe."""
        return " and ".join(stage.stage_name for stage in self.shared.fold.stages.values() if stage.observes)
