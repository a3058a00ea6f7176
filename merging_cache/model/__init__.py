"""Everything that knows transformers' models: the link to them, attention, rotary embeddings, what is refused."""

from .attention import Pass, find_pass
from .calling import CACHE_ARGUMENT, cache_argument
from .link import Link, can_link, forget, linked_model, merging_attention
from .loading import SHIPPED_MODELS, LoadedModel, load_model, model_folder
from .parallel import tensor_parallel_group
from .rotary import NoRotaryError, Rotary, rotary_of
from .support import (
    can_reread,
    check_fixable,
    check_rereadable,
    check_supported,
    config_of,
    most_positions,
    reads_stored_keys,
    settings,
    takes_masks,
)

__all__ = [
    "CACHE_ARGUMENT",
    "SHIPPED_MODELS",
    "Link",
    "LoadedModel",
    "NoRotaryError",
    "Pass",
    "Rotary",
    "cache_argument",
    "can_link",
    "can_reread",
    "check_fixable",
    "check_rereadable",
    "check_supported",
    "config_of",
    "find_pass",
    "forget",
    "linked_model",
    "load_model",
    "merging_attention",
    "model_folder",
    "most_positions",
    "reads_stored_keys",
    "rotary_of",
    "settings",
    "takes_masks",
    "tensor_parallel_group",
]
