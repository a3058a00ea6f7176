"""Puts the slots of a fold into the storage that fits them."""

from collections.abc import Callable
from dataclasses import replace

from ..states import Slots
from .base import EvenStorage, Storage
from .ragged import RaggedStorage


def store(slots: Slots, new_storage: Callable[[], EvenStorage]) -> Storage:
    """A storage that holds these slots: one that `new_storage` makes, or a ragged one of such where heads differ."""
    if slots.log_mass is not None and not slots.log_mass.any():
        slots = replace(slots, log_mass=None)
    if slots.valid is not None:
        return RaggedStorage(new_storage, slots)
    storage = new_storage()
    storage.fill(slots.keys, slots.values, slots.positions, slots.log_mass, slots.statistics)
    return storage
