"""Any scorer of kvpress as a scorer of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..states import LayerStates
from .once import OnceScorer


@dataclass
class KVPressScorer(OnceScorer):
    """Scores by a `ScorerPress` of an installed kvpress, whose `score` is called after each pass.

    Presses are written for a whole prompt in one pass, so each pass is scored by itself. What a press cannot do (other
    architectures, prompts shorter than its window, attention weights) it cannot do here.

    Args:
        press: the press. Its `compression_ratio` matters only where its scores depend on it.

    Raises:
        ImportError: if kvpress is not installed.
        TypeError: if `press` is not a `ScorerPress`.
    """

    needs_hidden_states = True
    needs_rotary = True
    needs_module = True

    press: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            from kvpress import ScorerPress
        except ImportError as error:
            raise ImportError("KVPressScorer needs kvpress: pip install kvpress") from error
        if not isinstance(self.press, ScorerPress):
            raise TypeError(f"press is {self.press!r}; give a ScorerPress of kvpress, such as SnapKVPress()")

    @property
    def stage_name(self) -> str:
        return f"KVPressScorer({type(self.press).__name__})"

    def score_new(self, states: LayerStates, new: int) -> Tensor:
        if states.heads is not None:
            raise ValueError(
                f"{self.stage_name} scores all heads of a layer at once, which is not possible once they store "
                "different numbers of tokens; use a budget that keeps them alike, or a scorer of merging_cache"
            )
        first = states.num_tokens - new
        keys, values = states.keys[:, :, first:], states.values[:, :, first:]
        given = {"position_embeddings": states.rotary.cos_sin(states.positions[:, 0, first:])}
        with _rotary_on(states.module, states.rotary.embedding):
            return self.press.score(states.module, states.hidden_states, keys, values, None, given)


@contextmanager
def _rotary_on(module: torch.nn.Module, rotary: torch.nn.Module) -> Iterator[None]:
    """Presses look for the rotary module on the attention module, where kvpress's own context would put it."""
    added = not hasattr(module, "rotary_emb")
    if added:
        module.__dict__["rotary_emb"] = rotary
    try:
        yield
    finally:
        if added:
            del module.__dict__["rotary_emb"]
