"""Where the slots and the tail of a layer lie: dense, quantized, ragged or fixed, with one interface for all."""

from .backends import BACKENDS, Backend, make_backend
from .base import EvenStorage, Storage
from .dense import DenseStorage
from .fixed import FixedStorage
from .quantized import QuantizedStorage
from .ragged import RaggedStorage
from .store import store

__all__ = [
    "BACKENDS",
    "Backend",
    "DenseStorage",
    "EvenStorage",
    "FixedStorage",
    "QuantizedStorage",
    "RaggedStorage",
    "Storage",
    "make_backend",
    "store",
]
