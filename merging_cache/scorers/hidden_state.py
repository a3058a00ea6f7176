"""Scorers that are small trained models of the hidden states."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..stage import check_calibrated_for
from ..states import LayerStates
from .once import OnceScorer
from .weights import Weights


@dataclass
class HiddenStateScorer(OnceScorer):
    """Scores each token by the hidden state that its attention took in.

    Args:
        weights: file, folder or hub name of the trained weights (see `Weights`).
    """

    needs_hidden_states = True

    weights: str = ""
    _weights: Weights = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.weights = str(self.weights)  # a path will do
        super().__post_init__()
        if not self.weights:
            raise ValueError(f"weights is {self.weights!r}; give the folder or the hub name of the trained weights")
        self._weights = Weights(self.weights)

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: Any) -> "HiddenStateScorer":
        """Load the weights now instead of at the first pass."""
        scorer = cls(weights=str(name_or_path), **options)
        _ = scorer._weights.tensors
        return scorer

    def check_model(self, config: Any, layers: Sequence[int]) -> None:
        check_calibrated_for(self.weights, config, layers)

    @abstractmethod
    def prefix(self, layer_idx: int) -> str:
        """What the names of a layer's weights begin with."""

    @abstractmethod
    def predict(self, hidden_states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """`[B, q, hidden]` in fp32 to `[B, H, q]` for all KV heads of the layer.

        `weights` are those of the layer, by the rest of their names, in fp32.
        """

    def score_new(self, states: LayerStates, new: int) -> Tensor:
        hidden = states.hidden_states.float()
        weights = self._weights.under(self.prefix(states.layer_idx), like=hidden)
        if not weights:
            raise ValueError(f"{self.weights} holds no weights for layer {states.layer_idx}; are they another model's?")
        try:
            scores = self.predict(hidden, weights)
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"the weights of layer {states.layer_idx} in {self.weights} do not fit hidden states of width "
                f"{hidden.shape[-1]} ({type(error).__name__}: {error}); are they another model's, or another scorer's?"
            ) from error
        if states.heads is not None:
            scores = scores[:, states.heads]
        if scores.shape[1] != states.keys.shape[1]:
            raise ValueError(
                f"{self.weights} scores {scores.shape[1]} KV heads, but layer {states.layer_idx} has "
                f"{states.keys.shape[1]}; are they another model's?"
            )
        return scores
