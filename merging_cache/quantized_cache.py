"""MergingQuantizedCache: the same cache over quantized storage."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .cache import MergingDynamicCache
from .config import MergingConfig
from .layers import FixedCache
from .stage import check_number
from .storage import EvenStorage, QuantizedStorage, make_backend


class MergingQuantizedCache(MergingDynamicCache):
    """A merging cache that stores keys and values quantized.

    A prompt is scored and merged in full precision and quantized once. Later tokens gather in full precision and are
    quantized `residual_length` at a time; what is packed stays untouched until the next fold. Unlike transformers'
    `QuantizedCache` it takes models with sliding-window layers (whose windows stay dense), and every cache operation
    works on it.

    Args:
        backend: `"quanto"` (optimum-quanto, 4 or 2 bits), `"hqq"` or `"fp8"` (8-bit floats, no further package).
        config: the model's config.
        nbits: bits per element; 4.
        axis_key, axis_value: the backend's quantization axes; by default the one whose groups lie inside a token.
        q_group_size: elements that share a scale; by default the largest divisor of the head dimension up to 64.
        residual_length: tokens that gather in full precision before they are quantized.
        merging, model, attention_mask, trace, **options: as for `MergingDynamicCache`.

    Raises:
        ValueError: for an unknown backend, or an option it does not have.
        ImportError: if the backend's package is not installed.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from merging_cache import MergingQuantizedCache
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=128, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1))
        >>> cache = MergingQuantizedCache(backend="fp8", config=model.config, compression_ratio=0.5)
        >>> _ = model(torch.arange(1, 97)[None], past_key_values=cache)
        >>> cache.report().total.bytes_now < 0.15 * cache.report().total.bytes_full
        True
    """

    def __init__(
        self,
        backend: str = "quanto",
        config: PreTrainedConfig | None = None,
        nbits: int | None = None,
        axis_key: int | None = None,
        axis_value: int | None = None,
        q_group_size: int | None = None,
        residual_length: int = 128,
        merging: MergingConfig | Mapping[str, Any] | str | Path | None = None,
        *,
        model: PreTrainedModel | None = None,
        attention_mask: Tensor | None = None,
        trace: bool = False,
        **options: Any,
    ) -> None:
        if options.pop("offloading", False):
            raise ValueError("MergingQuantizedCache does not offload; use MergingDynamicCache(offloading=True)")
        self._backend = make_backend(backend, nbits, axis_key, axis_value, q_group_size)
        check_number("residual_length", residual_length, int, minimum=1)
        self._residual_length = residual_length
        super().__init__(config, merging, model=model, attention_mask=attention_mask, trace=trace, **options)

    def fixed(self, max_new_tokens: int) -> FixedCache:
        """Not possible: a fixed cache is stored in full precision."""
        raise ValueError("a quantized cache cannot be fixed, which stores full precision; use MergingDynamicCache")

    @property
    def backend_name(self) -> str:
        """What quantizes, and to how many bits: `"quanto-4"`."""
        return self._backend.name

    def _storage(self) -> Callable[[], EvenStorage]:
        return partial(QuantizedStorage, self._backend, self._residual_length)
