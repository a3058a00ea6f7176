"""Tokens without which a layer would say something else when the model reads the context once more."""

from dataclasses import dataclass

from torch import Tensor

from ..stage import option
from ..states import LayerStates, Statistics, changes_left_out
from .base import Scorer


@dataclass
class LeaveOneOutScorer(Scorer):
    """How much the attention's output changes if a token is left out, while the model reads the context again.

    The context is read a second time as for `kvzip` (arXiv:2505.23416). For each token read again, a head that gives p
    of its attention to a token with the value v, and reads o, would read `o + p / (1 - p) (o - v)` without it. The
    score is the length of that change after the output projection, summed over the query heads of the group, relative
    to the length of what the whole layer adds; squared and summed over all tokens that are read again:
    `sum_q (sum_g p / (1 - p) |W_g (v - o_g)| / |y|)^2`. The largest attention, which `kvzip` goes by, takes all heads
    and layers for equal, whether what they read tells anything or not. Where the attention has no projection that
    fits, the heads' own outputs stand for it.

    Args:
        chunk_size: tokens that are read again at a time: with more of them it takes more memory and less time.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from merging_cache import MergingDynamicCache
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...     num_key_value_heads=2, vocab_size=99)
        >>> model = LlamaForCausalLM(config).eval()
        >>> cache = MergingDynamicCache(model=model, scorer="leave_one_out", compression_ratio=0.75)
        >>> output = model.generate(torch.arange(80)[None], past_key_values=cache, max_new_tokens=2, min_new_tokens=2)
        >>> sum(layer.slots_per_head.sum().item() for layer in cache.layers)  # of 80 tokens in 2 heads of 2 layers
        80
    """

    reads_again = True
    needs_outputs = True
    default_budget = "global"
    recent_share = 1 / 16  # the last tokens are read again like all others

    chunk_size: int = option(2048, minimum=1)

    def observe_again(self, states: LayerStates) -> Statistics:
        return Statistics(tokens=changes_left_out(states))

    def score(self, states: LayerStates) -> Tensor:
        return states.statistics.tokens
