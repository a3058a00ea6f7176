"""Everything that knows transformers' models: the link to them, attention, rotary embeddings, what is refused."""

from .attention import Pass
from .calling import CACHE_ARGUMENT, cache_argument
from .link import Link, can_link, linked_model, merging_attention
from .rotary import Rotary, rotary_of
from .support import check_supported, reads_stored_keys, settings, takes_masks

__all__ = [
    "CACHE_ARGUMENT",
    "Link",
    "Pass",
    "Rotary",
    "cache_argument",
    "can_link",
    "check_supported",
    "linked_model",
    "merging_attention",
    "reads_stored_keys",
    "rotary_of",
    "settings",
    "takes_masks",
]
