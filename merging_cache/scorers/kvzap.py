"""Tokens that a small learned model holds important, from the hidden states alone."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import gelu, linear

from .hidden_state import HiddenStateScorer


@dataclass
class KVzapScorer(HiddenStateScorer):
    """The logarithm of a token's KVzip+ score as a linear layer or an MLP predicts it (KVzap, arXiv:2601.07891).

    `linear(h)` or `linear(gelu(linear(h)))` of the attention's input h, one output per KV head. Scores have an absolute
    scale; they were made for `budget="threshold"`.

    Args:
        weights: file, folder or hub name, such as `"nvidia/KVzap-mlp-Qwen3-8B"`, of `layers.{i}.weight` and `.bias` for
            the linear kind, `layers.{i}.0.*` and `layers.{i}.2.*` for the MLP.
    """

    recent_share = 1 / 16  # as in the scores that it has learned

    def prefix(self, layer_idx: int) -> str:
        return f"layers.{layer_idx}."

    def predict(self, hidden_states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return gate(hidden_states, weights).mT


def gate(hidden_states: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """`[..., hidden]` to `[..., H]`, by the weights of one layer."""
    if "weight" in weights:
        return linear(hidden_states, weights["weight"], weights["bias"])
    hidden = gelu(linear(hidden_states, weights["0.weight"], weights["0.bias"]))
    return linear(hidden, weights["2.weight"], weights["2.bias"])
