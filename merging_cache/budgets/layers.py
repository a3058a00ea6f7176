"""Different numbers of slots for different layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..stage import check_number, option
from .uniform import UniformBudget


@dataclass
class PerLayerBudget(UniformBudget):
    """Every layer has its weight, and its heads share evenly.

    Layer i keeps `num_slots * weight_i / mean(weights)` slots per head, rounded down, at least 1 and at most all its
    tokens: all layers together keep what the uniform budget would, or less where a layer's part is more than it has.
    Only layers that fold count.

    Args:
        weights: one number for each folding layer, first to last.
        curve: instead of weights, points of a curve over depth, evenly spaced from the first layer to the last, with
            straight lines between: `[3, 1]` gives the first layer three times the slots of the last.

    Raises:
        ValueError: if not exactly one of the two is given, or a weight is not positive, or (when folding) there are not
            as many weights as folding layers.
    """

    ragged = True

    weights: Sequence[float] | None = None
    curve: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.weights is None) == (self.curve is None):
            raise ValueError(
                f"weights is {self.weights} and curve is {self.curve}; give one of them, the weight of every layer or "
                "points of a curve over depth"
            )
        given = self.weights if self.curve is None else self.curve
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"the weights of layers are {given!r}; give a list of positive numbers")
        for weight in given:
            check_number("the weight of a layer", weight, float)
        if len(given) == 0 or min(given) <= 0 or max(given) == math.inf:
            raise ValueError(
                f"the weights of layers are {list(given)}; they must be positive, finite numbers, one at least"
            )

    def layer_slots(self, num_slots: int, seen: int, layer_rank: tuple[int, int] | None) -> int:
        index, count = known(layer_rank)
        weights = self._weights(count)
        share = num_slots * weights[index] * count / sum(weights)
        return max(1, min(seen, int(share + 1e-9)))

    def _weights(self, count: int) -> list[float]:
        if self.weights is not None:
            if len(self.weights) != count:
                raise ValueError(
                    f"budget 'per_layer' has {len(self.weights)} weights, but the model has {count} layers that fold; "
                    "give one weight for each of them, or curve= for a curve over any number of layers"
                )
            return list(self.weights)
        weights = []
        for layer in range(count):
            place = layer * (len(self.curve) - 1) / max(1, count - 1)
            left = min(int(place), max(0, len(self.curve) - 2))
            right = min(left + 1, len(self.curve) - 1)
            weights.append(self.curve[left] + (self.curve[right] - self.curve[left]) * (place - left))
        return weights


@dataclass
class PyramidBudget(UniformBudget):
    """Slots that fall linearly from the first layer to the last (PyramidKV, arXiv:2406.02069).

    The last layer keeps `low = num_slots / beta` slots per head, the first `2 * num_slots - low`, unless that is more
    than there are tokens: then it keeps all, and the last layer so many more. The mean over layers stays `num_slots`.
    Only layers that fold count.

    Args:
        beta: how steep the pyramid is, at least 1 (flat).

    Raises:
        ValueError: if `beta` is below 1.
    """

    ragged = True

    beta: float = option(20.0, minimum=1)

    def layer_slots(self, num_slots: int, seen: int, layer_rank: tuple[int, int] | None) -> int:
        index, count = known(layer_rank)
        if count == 1:
            return num_slots
        high = min(seen, 2 * num_slots - num_slots / self.beta)
        low = 2 * num_slots - high
        return max(1, int(high - (high - low) * index / (count - 1) + 1e-9))


def known(layer_rank: tuple[int, int] | None) -> tuple[int, int]:
    """The layer's rank among the layers that fold, which a cache without a config cannot tell."""
    if layer_rank is None:
        raise ValueError(
            "a budget over layers has to know how many layers fold; give the cache the model: "
            "MergingDynamicCache(model=model, ...)"
        )
    return layer_rank
