"""Tokens that a small learned model holds important, from the hidden states alone."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.nn.functional import gelu, linear

from ..states import LayerStates
from ..weights import load_weights
from .once import OnceScorer


@dataclass
class HiddenStateScorer(OnceScorer):
    """Scores each token by the hidden state that its attention took in.

    Args:
        weights: folder or hub name of the trained weights, in safetensors.
    """

    needs_hidden_states = True

    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weights:
            raise ValueError(f"weights is {self.weights!r}; give the folder or the hub name of the trained weights")

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: Any) -> "HiddenStateScorer":
        """Load the weights now instead of at the first pass."""
        scorer = cls(weights=str(name_or_path), **options)
        _ = scorer._loaded
        return scorer

    @cached_property
    def _loaded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return load_weights(self.weights)

    def _of_layer(self, layer_idx: int, like: Tensor) -> dict[str, Tensor]:
        """A layer's weights by their names inside it, in fp32 on the device of `like`."""
        prefix = self._prefix(layer_idx)
        mine = {name[len(prefix) :]: tensor for name, tensor in self._loaded[1].items() if name.startswith(prefix)}
        if not mine:
            raise ValueError(f"{self.weights} holds no weights for layer {layer_idx}; are they another model's?")
        return {name: tensor.to(like) for name, tensor in mine.items()}

    @abstractmethod
    def _prefix(self, layer_idx: int) -> str:
        """What the names of a layer's weights begin with."""

    @abstractmethod
    def predict(self, hidden_states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """`[B, q, hidden]` in fp32 to `[B, H, q]` for all KV heads of the layer."""

    def score_new(self, states: LayerStates, new: int) -> Tensor:
        hidden = states.hidden_states.float()
        scores = self.predict(hidden, self._of_layer(states.layer_idx, hidden))
        if states.heads is not None:
            scores = scores[:, states.heads]
        if scores.shape[1] != states.keys.shape[1]:
            raise ValueError(
                f"{self.weights} scores {scores.shape[1]} KV heads, but layer {states.layer_idx} has "
                f"{states.keys.shape[1]}; are they another model's?"
            )
        return scores


@dataclass
class KVzapScorer(HiddenStateScorer):
    """The logarithm of a token's KVzip+ score as a linear layer or an MLP predicts it (KVzap, arXiv:2601.07891).

    `linear(h)` or `linear(gelu(linear(h)))` of the attention's input h, one output per KV head. Scores have an absolute
    scale; they were made for `budget="threshold"`.

    Args:
        weights: folder or hub name, such as `"nvidia/KVzap-mlp-Qwen3-8B"`: `layers.{i}.weight` and `.bias` in
            safetensors for the linear kind, `layers.{i}.0.*` and `layers.{i}.2.*` for the MLP.
    """

    def _prefix(self, layer_idx: int) -> str:
        return f"layers.{layer_idx}."

    def predict(self, hidden_states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        if "weight" in weights:
            scores = linear(hidden_states, weights["weight"], weights["bias"])
        else:
            hidden = gelu(linear(hidden_states, weights["0.weight"], weights["0.bias"]))
            scores = linear(hidden, weights["2.weight"], weights["2.bias"])
        return scores.mT
