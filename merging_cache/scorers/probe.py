"""Tokens that matter by a linear probe of their keys and values, which the model itself has taught."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..learner import Gather, Learner
from ..linalg import ridge_regressions
from ..stage import option
from ..states import TILE, LayerStates
from .base import Scorer
from .keydiff import KeyDiffScorer

LEAST = 1e-8  # the smallest change that is told from none
RIDGE = 1.0  # added to the variance of each standardized input
LEAST_DIFFERENT = 1 / 8  # of the tokens that it learns from
STEP = 2**-10  # to which scores are rounded


@dataclass
class ProbeScorer(Learner, Scorer):
    """What a linear probe of key and value says of how much the layer's output would change without the token.

    `log s = w_k k + w_v v + c`, with weights of its own for each KV head, where k is the key before RoPE (as it is,
    where the embedding cannot be made out) and v the value. The weights are learned from the model's first prompts, of
    which `probe_tokens` are read again: ridge regression of the logarithm of what `leave_one_out` says of them, on
    standardized keys and values. So the score, log s (to 2^-10), is what a second reading would say, at the price of a
    product.
    KVzap (arXiv:2601.07891) does the same with hidden states and much text; here nothing has to be trained before. As
    long as nothing is known, without the model to read again or from prompts that say the same again and again, the
    score is that of `keydiff`.

    Args:
        probe_tokens: how many tokens of the first prompts are read again. Where all layers see all tokens and none was
            folded, they see the first few tokens and a window of 1,024 around themselves, so that a long prompt makes
            them no slower.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from merging_cache import MergingDynamicCache
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...     num_key_value_heads=2, vocab_size=99)
        >>> model = LlamaForCausalLM(config).eval()
        >>> cache = MergingDynamicCache(model=model, scorer="probe", compression_ratio=0.75)
        >>> output = model.generate(torch.arange(80)[None], past_key_values=cache, max_new_tokens=2, min_new_tokens=2)
        >>> cache.report().layers[0].scorer
        'probe'
    """

    uses_rotary = True
    default_budget = "profile"
    recent_share = 1 / 16  # the last tokens are judged like all others

    probe_tokens: int = option(320, minimum=1)

    def learn(self, layers: Sequence[LayerStates], gather: Gather, different: float = 1.0) -> list[Tensor]:
        found = [fitted(torch.cat(inputs(layer), dim=-1)[0], layer.statistics.tokens[0]) for layer in layers]
        # what few tokens say, again and again, does not even hold for the rest of their own prompt
        return found if different >= LEAST_DIFFERENT else [torch.full_like(one, torch.nan) for one in found]

    def score(self, states: LayerStates) -> Tensor:
        silent = None if states.lesson is None else states.lesson.isnan().any(dim=2).any(dim=1)  # [B or 1]
        if silent is None or silent.all():
            return KeyDiffScorer().score(states)
        weights = states.lesson.to(states.keys.device)
        weights = weights.expand(len(states.keys), -1, -1)
        split = [states.keys.shape[3], states.values.shape[3], 1]
        of_keys, of_values, constant = weights.unsqueeze(-1).split(split, dim=2)
        batch, heads, length, dim = states.keys.shape
        step = max(1, TILE // (batch * heads * dim))
        parts = (inputs(states, slice(first, first + step)) for first in range(0, length, step))
        scores = [keys @ of_keys + values @ of_values for keys, values in parts]
        # in the first layer equal tokens are equal but for rounding: so that ties are ties
        scores = ((torch.cat(scores, dim=2) + constant).squeeze(-1) / STEP).round() * STEP
        if silent.any():
            scores = torch.where(silent.view(-1, 1, 1).to(scores.device), KeyDiffScorer().score(states), scores)
        return scores


def inputs(states: LayerStates, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Keys before RoPE and values of a part of the tokens, `[B, H, n, D]` each, in fp32."""
    keys, positions = states.keys[:, :, part], states.positions[:, :, part]
    if states.rotary is not None:
        # once for all heads, where they have the same tokens
        positions = positions[:, 0] if positions.stride(1) == 0 else positions
        keys = states.rotary.unrotated(keys, positions)
    return keys.float(), states.values[:, :, part].float()


def fitted(inputs: Tensor, changes: Tensor) -> Tensor:
    """`[H, D + 1]`, weights and constant of the linear map from inputs `[H, n, D]` to the logarithm of `[H, n]`."""
    heads, count, dim = inputs.shape
    if not count:
        return inputs.new_zeros(heads, dim + 1)
    wanted = changes.clamp_min(LEAST).log().unsqueeze(-1)
    ((weights, constant),) = ridge_regressions(inputs, wanted, [RIDGE])
    return torch.cat([weights.squeeze(1), constant], dim=1).float()
