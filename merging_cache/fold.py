"""One fold of one layer, from many tokens to few slots: score, allocate, merge, with padding out of everybody's way.

Pure functions of tensors; knows nothing of transformers or of how slots are stored.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .budgets import Budget
from .mergers import Merger
from .scorers import Scorer
from .states import LayerStates, Slots


@dataclass(frozen=True)
class Fold:
    """A scorer, a budget and a merger applied in turn: `fold(states, num_slots)` gives the `Slots` to store.

    Args:
        scorer: gives every token of every KV head an importance.
        budget: chooses the survivors.
        merger: decides what becomes of the evicted.
        sink_tokens, recent_tokens: how many first and last tokens of each row always keep their slot and take nothing
            in. Where `num_slots` is smaller than both together, sinks go first, then the most recent.
    """

    scorer: Scorer
    budget: Budget
    merger: Merger
    sink_tokens: int = 4
    recent_tokens: int = 32

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fold":
        return self  # immutable, like the config it comes from

    def __call__(self, states: LayerStates, num_slots: int) -> Slots:
        """Fold `[B, H, L, D]` states into `num_slots` slots per head; `num_slots` must be less than L.

        Rows with padding are folded as if they stood alone. transformers masks the slots of a row with the last
        `num_slots` columns of its attention mask, so a row gets as many slots as these columns hold real tokens: all
        `num_slots` of them unless the row is shorter than that, in which case it keeps everything it has. Padding
        stays only where the mask hides it.
        """
        if states.padding is None:
            return self._fold_rows(states, num_slots)
        last = slice(states.num_tokens - num_slots, None)
        slots = Slots(
            keys=states.keys[:, :, last].clone(),
            values=states.values[:, :, last].clone(),
            positions=states.positions[:, :, last].clone(),
            log_mass=None,
            num_merged=torch.zeros_like(states.positions[:, :, 0]),
            num_dropped=torch.zeros_like(states.positions[:, :, 0]),
        )
        patterns, pattern_of_row = torch.unique(states.padding, dim=0, return_inverse=True)
        for index, padding in enumerate(patterns):
            rows = (pattern_of_row == index).nonzero().squeeze(1)
            visible = (~padding[last]).nonzero().squeeze(1)
            if len(visible) == 0:
                continue
            alone = states.select(rows, (~padding).nonzero().squeeze(1))
            folded = self._fold_rows(alone, len(visible))
            if folded.log_mass is not None and slots.log_mass is None:
                slots = replace(slots, log_mass=torch.zeros_like(slots.positions, dtype=folded.log_mass.dtype))
            folded.write_into(slots, rows, visible)
        return slots

    def _fold_rows(self, states: LayerStates, num_slots: int) -> Slots:
        """Fold rows without padding; `num_slots` may equal L, then all tokens survive."""
        check_finite(states)
        scores = self._protect(self._score(states), num_slots)
        survivors = self.budget.allocate(scores, states, num_slots)
        survivors = replace(survivors, protected=scores.gather(2, survivors.indices).isposinf())
        return self.merger.merge(states, survivors)

    def _score(self, states: LayerStates) -> Tensor:
        """The scorer's `[B, H, L]` scores in fp32, checked; its own infinities made finite."""
        scores = self.scorer.score(states)
        name = type(self.scorer).__name__
        if not isinstance(scores, Tensor) or scores.shape != states.keys.shape[:3]:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"scorer {name} returned {got} for keys {tuple(states.keys.shape)}; a scorer returns one score per "
                f"token and KV head, [B, H, L] = {tuple(states.keys.shape[:3])}"
            )
        scores = scores.float()
        if scores.isnan().any():
            raise ValueError(f"scorer {name} returned NaN in layer {states.layer_idx}; scores must be comparable")
        return scores.clamp(torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)

    def _protect(self, scores: Tensor, num_slots: int) -> Tensor:
        """Infinite scores for sinks and recent tokens, clipped to `num_slots`."""
        sinks = min(self.sink_tokens, num_slots)
        recent = min(self.recent_tokens, num_slots - sinks)
        index = torch.arange(scores.shape[2], device=scores.device)
        return scores.masked_fill((index < sinks) | (index >= len(index) - recent), torch.inf)


def check_finite(states: LayerStates) -> None:
    """Refuse to fold NaN or infinite states: they would spread to every survivor they are merged into."""
    for name, tensor in (("keys", states.keys), ("values", states.values)):
        if not tensor.isfinite().all():
            raise ValueError(
                f"layer {states.layer_idx} has non-finite {name} (NaN or infinity) and cannot be folded; the model "
                f"overflowed in {tensor.dtype}: load it in bfloat16 or float32, or look at its inputs"
            )
