"""How long a sweep takes: what a few of its caches took, and how people say it."""

from collections.abc import Sequence
from dataclasses import dataclass

from .config import Variant


@dataclass
class Seconds:
    """How long readings and caches took so far."""

    readings: int = 0
    reading: float = 0.0
    caches: int = 0
    cache: float = 0.0

    @property
    def per_reading(self) -> float:
        """Mean seconds of a reading."""
        return self.reading / max(1, self.readings)

    @property
    def per_cache(self) -> float:
        """Mean seconds to fill a cache and ask it."""
        return self.cache / max(1, self.caches)


def counted(count: int, what: str) -> str:
    """`"1 reading"`, `"1,024 readings"`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """`"40 s"`, `"25 min"`, `"3 h 20 min"`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def spread(variants: Sequence[Variant], count: int) -> list[Variant]:
    """`count` of them at most, evenly spread."""
    count = min(count, len(variants))
    return [variants[int((number + 0.5) * len(variants) / count)] for number in range(count)]
