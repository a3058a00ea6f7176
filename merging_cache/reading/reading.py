"""Reading: one pass of a model over a context, kept, from which many caches can be filled."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..cache import MergingDynamicCache
from ..layers import KnownReadings
from ..model import cache_argument, most_positions
from ..stage import check_number
from .recording import RecordingCache

RESERVED = {"cache", "past_key_values", "generation_config", "max_new_tokens", "do_sample", "use_cache"}
SHOWN_FROM = 4096  # tokens from which reading takes long enough for a progress bar


class Reading:
    """A context that a model has read once, for caches of every kind: `fill` gives each what a prefill would give it.

    Kept of every layer are keys, values, queries and the attention's input, and what else layers that do not fold hold:
    for each token and layer `(2 * KV heads + query heads) * head_dim + hidden_size` numbers, 189 MB for 1,024 tokens of
    SmolLM2-135M in fp32, half of it on most models without `hidden_states`. What a prefill adds to the memory of the
    cache it fills is the same as in `generate`.

    Args:
        model: a causal language model. It is linked (see `merging_attention`) while it reads, where it can be.
        input_ids: `[B, L]`, or all that the tokenizer gives; or by name what else `model.generate` takes for a prompt.
        attention_mask: `[B, L]`, 0 where a row is padded (on the left).
        chunk_size: read so many tokens at a time, which takes less memory for activations and gives the same up to
            rounding; all at once by default.
        hidden_states: whether to keep the attention's input, which `kvzap` and `fast_kvzip` look at.
        progress: whether to show a progress bar; by default for contexts of 4,096 tokens or more.
        **inputs: more of what `model.generate` takes.

    Attributes:
        logits: `[B, vocabulary]`, those of the token that follows.
        num_tokens: L.
        attention_mask: as it was given.
        seconds: how long it took.
        fill_seconds: how long the last `fill` took, or would have taken alone: what is read again for some scorers and
            budgets is read once and remembered for the next caches.

    Raises:
        ValueError: for a context that is empty, or longer than the model allows, and for what `generate` refuses.
        TypeError: for ids of another kind.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from merging_cache import MergingDynamicCache, Reading
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))
        >>> reading = Reading(model, torch.arange(1, 65)[None])
        >>> for scorer in ("keydiff", "snapkv"):
        ...     cache = reading.fill(MergingDynamicCache(model=model, scorer=scorer, compression_ratio=0.75))
        ...     print(scorer, cache.get_seq_length(), cache.layers[0].num_slots)
        keydiff 64 16
        snapkv 64 16
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        chunk_size: int | None = None,
        hidden_states: bool = True,
        progress: bool | None = None,
        **inputs: Any,
    ) -> None:
        if chunk_size is not None:
            check_number("chunk_size", chunk_size, int, minimum=1)
        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"model is {type(model).__name__}; give a transformers model, such as AutoModelForCausalLM's"
            )
        if isinstance(input_ids, Mapping):  # what a tokenizer gives
            inputs, input_ids = {**input_ids, **inputs}, None
        inputs |= {"input_ids": input_ids} if input_ids is not None else {}
        inputs |= {"attention_mask": attention_mask} if attention_mask is not None else {}
        for name in inputs.keys() & RESERVED:
            raise TypeError(f"{name} is given, but a reading decides that by itself; leave it out")
        states, attention_mask = inputs.get("input_ids", inputs.get("inputs_embeds")), inputs.get("attention_mask")
        if not isinstance(states, Tensor | None) or (states is not None and states.dim() < 2):
            came = f"a tensor of shape {tuple(states.shape)}" if isinstance(states, Tensor) else type(states).__name__
            raise TypeError(f"input_ids is {came}; give ids of shape (batch, tokens), or what the tokenizer gives")
        if states is None or not states.shape[1]:
            raise ValueError("there is nothing to read: give input_ids of shape (batch, tokens)")
        if attention_mask is not None and attention_mask.shape != states.shape[:2]:
            came, wanted = tuple(attention_mask.shape), tuple(states.shape[:2])
            raise ValueError(f"attention_mask is of shape {came}; it must be {wanted}, as the tokens")
        self.model = model
        self.num_tokens = states.shape[1]
        self.attention_mask = attention_mask
        self._given = {name: inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs}
        check_length(model, self.num_tokens)
        self._known = KnownReadings()
        self.fill_seconds = 0.0
        self._recorded = RecordingCache(model, hidden_states)
        # the one token that is generated is not fed back, so no layer sees it
        once = GenerationConfig(
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            eos_token_id=model.generation_config.eos_token_id,
            pad_token_id=model.generation_config.pad_token_id or 0,
            output_logits=True,
            return_dict_in_generate=True,
            prefill_chunk_size=chunk_size,
        )
        shows = self.num_tokens >= SHOWN_FROM if progress is None else progress
        started = clock(model.device)
        try:
            with self._recorded.progress_bar(self.num_tokens, shows):
                output = model.generate(**inputs, **cache_argument(self._recorded), generation_config=once)
        finally:
            self._recorded.release()
        self.seconds = clock(model.device) - started
        self.logits = output.logits[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._recorded.nbytes

    @torch.no_grad()
    def fill(self, cache: Cache) -> Cache:
        """Give an empty cache what `model.generate` would have left in it of the context, bit for bit.

        Of a context that was read in chunks, what a single pass over these keys, values and queries would have left:
        with `fold_at="decode"` that is what the chunks themselves give.

        Args:
            cache: of the same model: `MergingDynamicCache`, `MergingQuantizedCache`, `DynamicCache`, `QuantizedCache`.

        Returns:
            `cache`.

        Raises:
            ValueError: for a cache that is not empty or belongs to another model, and where it needs what the reading
                did not keep.
            TypeError: for a cache whose layers are of other kinds than the model's.
        """
        if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
            raise TypeError(f"cache is {type(cache).__name__}; give a cache of transformers that has layers")
        if any(isinstance(layer, CacheLayerMixin) and layer.get_seq_length() for layer in cache.layers):
            raise ValueError("the cache is not empty: a reading fills a new one (or call cache.reset() before)")
        if isinstance(cache, MergingDynamicCache):
            if not cache.is_of(self.model):
                name = type(self.model).__name__
                raise ValueError(f"the cache was made for another model than the {name} that has read")
            if cache.needs_hidden_states and not self._recorded.keeps_hidden_states:
                raise ValueError("the cache looks at hidden states, and none were kept; read with hidden_states=True")
        started, saved = clock(self.model.device), self._known.seconds_saved
        self._recorded.fill(cache)
        if isinstance(cache, MergingDynamicCache):
            cache.after_pass(self._given, self._known)  # what the scorer has read again is, unless it was before
        self.fill_seconds = clock(self.model.device) - started + self._known.seconds_saved - saved
        return cache


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuse more tokens than the model has positions for."""
    most = most_positions(model.config.get_text_config(decoder=True))
    if most is not None and length > most:
        raise ValueError(f"the context has {length} tokens, but {type(model).__name__} allows at most {most}")


def clock(device: torch.device) -> float:
    """Seconds, all work on the device being done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
