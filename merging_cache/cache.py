"""MergingDynamicCache: the cache a user passes to `generate`."""

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer

from .config import MergingConfig, resolve_config
from .layers import (
    FixedCache,
    HybridLayer,
    JointFold,
    KnownReadings,
    Learned,
    MergingHybridLayer,
    MergingLayer,
    Padding,
    SecondReading,
    Shared,
    TokensSeen,
    check_histories,
)
from .model import (
    Link,
    can_link,
    can_reread,
    check_fixable,
    check_rereadable,
    check_supported,
    config_of,
    takes_masks,
    tensor_parallel_group,
)
from .report import CacheReport, Fates, report_layers
from .stage import check_number
from .storage import DenseStorage, EvenStorage


class MergingDynamicCache(DynamicCache):
    """A `DynamicCache` whose full-attention layers fold their tokens into fewer slots at the end of prefill.

    Sliding-window, linear-attention and KV-sharing layers stay transformers' own.

    Args:
        config: the model's config (`model.config`). Without it every layer is taken for full attention, which the cache
            warns of.
        model: instead of the config, the model itself: for scorers and mergers that look at queries, and budgets that
            differ between heads or layers. It is linked (see `merging_attention`) until `release`, or inside a block
            until its end, and padding is then known without `attention_mask`.
        merging: how to fold: a `MergingConfig`, a dict of its fields, or a path to its JSON file.
        attention_mask: `[B, tokens]`, the tokenizer's mask, where the batch is padded: a cache sees keys and values
            only. One row per prompt; rows are repeated for beams. It may also be set later:
            `cache.attention_mask = mask`.
        trace: keep where every evicted token went, for `plot_merges`: 4 bytes for each token, layer and KV head.
        offloading, offload_only_non_sliding: as in `DynamicCache`: keep layers in CPU memory between passes. GPUs only.
        **options: the fields of `MergingConfig` one by one, on top of `merging`.

    Raises:
        ValueError: for options that are unknown, out of range or contradictory.
        TypeError: for options of another type, such as a model where its config belongs.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from merging_cache import MergingDynamicCache
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None))
        >>> prompt = torch.arange(1, 65)[None]
        >>> cache = MergingDynamicCache(config=model.config, scorer="keydiff", compression_ratio=0.5, recent_tokens=8)
        >>> _ = model.generate(prompt, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0)
        >>> cache.get_seq_length(), cache.layers[0].keys.shape[2]  # tokens seen; 32 slots and 4 generated tokens
        (68, 36)
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        merging: MergingConfig | Mapping[str, Any] | str | Path | None = None,
        *,
        model: PreTrainedModel | None = None,
        attention_mask: Tensor | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        trace: bool = False,
        **options: Any,
    ) -> None:
        config = config_of(config, model)
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config is {type(config).__name__}; give the model's config, `config=model.config`")
        if offloading and not torch.cuda.is_available():
            raise ValueError(
                "offloading=True moves layers from a GPU to the CPU, but no CUDA device is available; leave it out"
            )
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        self.merging = resolve_config(merging, options)
        if not isinstance(trace, bool):
            raise TypeError(f"trace is {trace!r}; it must be True or False")
        self._recording = False
        self._config = None if config is None else config.get_text_config(decoder=True)
        # from how many tokens on the model rotates otherwise (Phi-3), if something folds here; asked for in every step
        switches_at = getattr(self._config, "original_max_position_embeddings", None)
        self._switches_at = switches_at if self.merging.compression_ratio != 0 else None
        linked = model is not None and can_link(model) and takes_masks(self._config)
        fold, folds = self.merging.build(linked, linked and can_reread(config)), self.merging.compression_ratio != 0
        folding = [index for index, layer in enumerate(self.layers) if type(layer) in (DynamicLayer, HybridLayer)]
        if folding and folds:
            late = self.merging.fold_at == "decode"
            check_supported(self._config, folding, fold.merger.merges_values, fold.fits_masks, late)
            fold.check_model(self._config, folding)
        if folds and fold.rereading and linked:
            check_rereadable(config, [stage.stage_name for stage in fold.rereading.values()])
        padding, needed = Padding(attention_mask), folds and fold.needs_attention
        hidden_states = needed and fold.needs_hidden_states
        # last of what may raise, so that no model is left linked
        link = Link(model, config, needed, type(self).__name__, hidden_states)
        group = tensor_parallel_group(model)
        joint = JointFold(fold.budget, group) if fold.budget.over_layers else None
        learners = fold.learners if folds else {}
        learned = {name: Learned(name, one, folding, link.memory, group) for name, one in learners.items()}
        rereads = folds and fold.rereading
        again = SecondReading(fold.rereading, fold.scorer.chunk_size, fold.again_tokens) if rereads else None
        self._shared = Shared(self.merging, fold, padding, link, self._storage(), trace, joint, again, learned)
        if self._shared.is_to_be_read_again:
            link.watch_passes()
        if config is None:
            if folds:
                warnings.warn(
                    f"{type(self).__name__} was given neither config=model.config nor model=model, so it takes every "
                    "layer for full attention; for a model with sliding windows or other kinds of layers the output "
                    "would be wrong.",
                    stacklevel=3 if type(self) is not MergingDynamicCache else 2,
                )
            return
        for rank, index in enumerate(folding):
            self.layers[index] = self._folding(self.layers[index], index, (rank, len(folding)))
        if not folding:
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            warnings.warn(
                f"No layer of {type(config).__name__} has full attention over all tokens (they are {kinds}), so "
                "nothing will be folded.",
                stacklevel=2,
            )

    def _storage(self) -> Callable[[], EvenStorage]:
        """What makes the storage of a layer."""
        return DenseStorage

    def _folding(self, layer: CacheLayerMixin, index: int, rank: tuple[int, int]) -> MergingLayer:
        """The layer that folds in the place of one of transformers' own."""
        if type(layer) is HybridLayer:
            return MergingHybridLayer(self._shared, index, rank, number_of_states=layer.number_of_states)
        return MergingLayer(self._shared, index, rank)

    @property
    def layer_class_to_replicate(self) -> Callable[[], MergingLayer] | None:
        """What makes the layers that are not known beforehand: without a config all of them."""
        return self._next_layer if self._config is None else None

    @layer_class_to_replicate.setter
    def layer_class_to_replicate(self, given: Any) -> None:
        pass  # it is no attribute: with its own method in it the cache would keep itself alive

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store the keys and values of a pass in a layer, see `MergingLayer.update`."""
        if layer_idx == 0:
            check_histories([layer.seen for layer in self.folding_layers])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _next_layer(self) -> MergingLayer:
        layer = MergingLayer(self._shared, len(self.layers))
        if self._recording:
            layer.activate_past_recording()
        return layer

    def __deepcopy__(self, memo: dict[int, Any]) -> "MergingDynamicCache":
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        twin._shared = self._shared.twin()
        for layer in twin.folding_layers:
            layer.join(twin._shared)
        return twin

    @property
    def folding_layers(self) -> list[MergingLayer]:
        """The layers that fold."""
        return [layer for layer in self.layers if isinstance(layer, MergingLayer)]

    @property
    def needs_hidden_states(self) -> bool:
        """Whether some stage looks at the attention's input."""
        return self.merging.compression_ratio != 0 and self._shared.fold.needs_hidden_states

    def is_of(self, model: PreTrainedModel) -> bool:
        """Whether it was made for this model, or one of its kind, as far as it was told."""
        own, other = self._config, config_of(None, model).get_text_config(decoder=True)
        return own is None or (type(own), own.num_hidden_layers) == (type(other), other.num_hidden_layers)

    @property
    def attention_mask(self) -> Tensor | None:
        """`[B, tokens]`, 0 where a token of the batch is padding; `None` where none is known to be."""
        return self._shared.padding.attention_mask

    @attention_mask.setter
    def attention_mask(self, attention_mask: Tensor | None) -> None:
        self._shared.padding.set(attention_mask)

    def release(self, model: PreTrainedModel | None = None) -> None:
        """Put the model back as it was before it was linked, unless another cache or a `with` block still needs it.

        Afterwards this cache can go on decoding only if its heads and layers are all of one length; otherwise the next
        pass raises `ValueError`.

        Args:
            model: the model, or `None` for the one that the cache was given.

        Raises:
            ValueError: if it is another model than that.
        """
        self._shared.link.release(model)
        for layer in self.folding_layers:
            layer.release()

    def fold(self) -> "MergingDynamicCache":
        """Fold now what waits for its fold, as prompts do with `fold_at="decode"`; returns the cache."""
        shared, layers = self._shared, self.folding_layers
        check_histories([layer.seen for layer in layers])
        decoder, due = shared.link.decoder if shared.is_to_be_read_again else None, None
        if decoder is not None and any(layer.fold_is_due for layer in layers):
            for layer in layers:
                layer.check_finite()
            due = shared.again.run(self.layers, shared.padding, decoder, shared.row_is_due, shared.recalls)
            for one in shared.learned.values():
                one.learn(layers, due.words)
        for layer in layers:
            layer.fold()
        if due is not None:
            shared.again.finish(due)
        return self

    def before_pass(self, given: Mapping[str, Any]) -> None:
        """The model is about to read; called by its decoder, where a stage reads again."""
        if self._shared.is_to_be_read_again:
            new = given["input_ids" if given.get("inputs_embeds") is None else "inputs_embeds"].shape[1]
            if any(layer.folds_before(new) for layer in self.folding_layers):
                self.fold()

    def after_pass(self, given: Mapping[str, Any], known: KnownReadings | None = None) -> None:
        """The model has read; called by its decoder, where a stage reads again."""
        if self._shared.is_to_be_read_again:
            new = self._shared.again.note(given, known)
            if self.merging.fold_at == "decode" or any(layer.record_past for layer in self.folding_layers):
                return
            try:
                self.fold()
            except Exception:
                self._shared.again.truncate(new)
                for layer in self.folding_layers:
                    if layer.fold_is_due:
                        layer.undo_pass()
                raise

    def fixed(self, max_new_tokens: int) -> FixedCache:
        """What this cache holds, with room for `max_new_tokens` and no more, for decoding that is compiled.

        Nothing grows then, so that one graph runs for every token (two more where sliding windows get full). A fold
        that is due is done first, on this cache, which is otherwise left alone: the other has a copy. To go on in
        several ways, repeat the rows before: `batch_repeat_interleave`.

        Args:
            max_new_tokens: those `generate` is asked for, if the prompt's last token is not yet in this cache.

        Raises:
            ValueError: for an empty cache; where heads differ or slots have mass, which only the linked attention
                reads; for linear-attention states, quantized layers, and models that read stored keys (Dory).

        Example:
            >>> import torch
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from merging_cache import MergingDynamicCache
            >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64,
            ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None))
            >>> prompt = torch.arange(1, 65)[None]
            >>> cache = MergingDynamicCache(config=model.config, compression_ratio=0.5)
            >>> _ = model(prompt[:, :-1], past_key_values=cache)
            >>> fixed = cache.fixed(max_new_tokens=9)
            >>> output = model.generate(prompt, past_key_values=fixed, max_new_tokens=8, pad_token_id=0)
            >>> output.shape, fixed.layers[0].keys.shape[2]  # 31 slots, the prompt's last token and 8 new ones
            (torch.Size([1, 72]), 40)
        """
        check_number("max_new_tokens", max_new_tokens, int, minimum=1)
        check_fixable(self._config)
        check_histories([layer.seen for layer in self.folding_layers])
        return FixedCache(self.layers, max_new_tokens)

    def report(self) -> CacheReport:
        """What every layer has seen, kept, merged and saved; `print` it for a table."""
        return report_layers(self.layers, self, self._shared.with_model)

    def fates(self, row: int = 0) -> Fates:
        """What became of the tokens of a row of the batch, layer by layer: what `plot_merges` draws.

        Raises:
            ValueError: if there is no such row, or the cache is empty.
        """
        folding = {index: layer for index, layer in enumerate(self.layers) if isinstance(layer, MergingLayer)}
        return Fates.of(folding, row)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, folded ones included."""
        return TokensSeen(super().get_seq_length(layer_idx), self._switches_at)

    def __bool__(self) -> bool:
        """False for an empty cache of a model that would throw it away otherwise; see `TokensSeen`."""
        return self._switches_at is None or super().get_seq_length() > 0

    def activate_past_recording(self) -> None:
        """Fold nothing until the next `crop`, so that drafts can be taken back.

        `generate` calls it for assisted decoding (transformers 5.14 and newer). It lasts until `reset`: a later turn
        that drafts nothing stays unfolded.
        """
        self._recording = True  # for layers that are made later
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens from every layer, or from none.

        Raises:
            ValueError: if a layer cannot give them back because they were folded.
        """
        folding = self.folding_layers
        others = [layer for layer in self.layers if layer not in folding]
        for layer in folding:
            layer.check_crop(int(tokens_to_remove))
        before = [dict(vars(layer)) for layer in others]
        try:
            for layer in others:
                layer.crop(int(tokens_to_remove))
        except Exception:
            for layer, attributes in zip(others, before, strict=True):
                vars(layer).update(attributes)
            raise
        for layer in folding:
            removed = layer.check_crop(int(tokens_to_remove))
            layer.crop(int(tokens_to_remove))
        if self._shared.is_to_be_read_again and folding:
            self._shared.again.truncate(removed)
            self.fold()

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the whole cache back as it was."""
        return all(getattr(layer, "is_croppable", True) for layer in self.layers)

    def reset(self) -> None:
        """Empty the cache for another prompt. The attention mask goes too: it belonged to the old batch."""
        self._recording = False
        for layer in self.layers:
            layer.reset()
        self._shared.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row `beam_idx[i]` of the batch row i."""
        # repeating and selecting rows come here too: what every kind of layer can do is to take rows by index
        if (batch := self._batch) is not None:
            self._shared.select_rows(beam_idx, batch)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        check_number("repeats", repeats, int, minimum=1)
        if (batch := self._batch) is not None:
            self.reorder_cache(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows `indices`, integers or a bool mask."""
        if (batch := self._batch) is not None:
            self.reorder_cache(torch.arange(batch)[torch.as_tensor(indices).cpu()])

    @property
    def _batch(self) -> int | None:
        return next((layer.batch for layer in self.folding_layers if layer.num_stored), None)

    def __iter__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} cannot be taken apart into keys and values: positions and counts would be lost. "
            "Read cache.layers[i].keys, .values and .positions instead"
        )
