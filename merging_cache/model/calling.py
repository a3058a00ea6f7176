"""How models and `generate` are handed a cache: the one place that knows what the installed transformers calls it."""

import inspect
from typing import Any

from transformers import Cache, GenerationMixin

# `cache` from transformers 5.24 on, `past_key_values` before; some models of 5.24 ignore the old name
_NAMES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_ARGUMENT = "cache" if "cache" in _NAMES else "past_key_values"


def cache_argument(cache: Cache | None) -> dict[str, Any]:
    """`cache` by the name that models take it under: `model.generate(**inputs, **cache_argument(cache))`."""
    return {CACHE_ARGUMENT: cache}
