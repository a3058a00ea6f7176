"""Tokens that a learned gate lets through, from the hidden states alone."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..stage import option
from ..states import LayerStates
from .hidden_state import HiddenStateScorer

NORM_EPSILON = 1e-6


@dataclass
class FastKVzipScorer(HiddenStateScorer):
    """A gate per KV head that attends to learned sink keys (Fast KVzip, arXiv:2601.17668).

    With query and key projections of the attention's input h, both normalised (RMS), each query of the group weighs
    the token's own key against the learned sink keys: `1 / (1 + sum_s exp(q.k_s / sqrt(d) - (q.k / sqrt(d) + b)))`,
    averaged over the group. The first `n_sink` tokens score 1, and so does the recent window: `window_ratio` of the
    tokens (one at least), or `window_size` from 32,000 tokens on. The paper shares slots over all layers at once, which
    a cache that folds layer by layer cannot; `budget="threshold"` or `"adakv"` come closest.

    Args:
        weights: file, folder or hub name of the gates, such as `"Jang-Hyun/Fast-KVzip/qwen3-8b"`: `{i}.q_proj.weight`
            and so on for layer i, or a `.pt` file that lists each layer's.
        n_sink: first tokens that score 1.
        window_size, window_ratio: the recent window of long and of shorter sequences.
    """

    n_sink: int = option(4, minimum=0)
    window_size: int = option(4096, minimum=1)
    window_ratio: float = option(0.02, minimum=0, maximum=1)

    def prefix(self, layer_idx: int) -> str:
        return f"{layer_idx}."

    def predict(self, hidden_states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        dim, heads = weights["q_norm.weight"].shape[0], weights["b"].shape[0]
        queries = linear(hidden_states, weights["q_proj.weight"], weights["q_proj.bias"])
        keys = linear(hidden_states, weights["k_proj.weight"])
        queries = _rms_norm(queries.unflatten(-1, (heads, -1, dim)), weights["q_norm.weight"]).transpose(1, 2)
        keys = _rms_norm(keys.unflatten(-1, (heads, 1, dim)), weights["k_norm.weight"]).transpose(1, 2)
        own = (queries * keys).sum(dim=-1) / math.sqrt(dim) + weights["b"]  # [B, H, q, G], b is [H, 1, G]
        sinks = queries @ weights["k_base"].mT / math.sqrt(dim)  # k_base is [H, 1, sinks, d]
        return (1 / (1 + (sinks - own.unsqueeze(-1)).exp().sum(dim=-1))).mean(dim=-1)

    def score(self, states: LayerStates) -> Tensor:
        scores, length = super().score(states), states.num_tokens
        window = self.window_size if length >= 32_000 else max(1, int(length * self.window_ratio))
        kept = (states.positions < self.n_sink) | (torch.arange(length, device=scores.device) >= length - window)
        return scores.masked_fill(kept, 1.0)


def _rms_norm(states: Tensor, weight: Tensor) -> Tensor:
    return states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + NORM_EPSILON) * weight
