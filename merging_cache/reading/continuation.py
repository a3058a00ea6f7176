"""How likely a cache holds what follows: tokens behind a context, fed in one pass, many of them at a time."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..cache import MergingDynamicCache
from ..model import cache_argument

MOST_KEYS = 1 << 16  # tokens of all copies of a cache that are asked at a time


@dataclass(frozen=True)
class Continuation:
    """What comes behind a context.

    Args:
        given: tokens that are fed first, one at least.
        predicted: tokens that follow them, of which it is asked how likely they are.
        row: the row of the batch whose context it is.
    """

    given: Sequence[int]
    predicted: Sequence[int]
    row: int = 0

    def __post_init__(self) -> None:
        if not self.given or not self.predicted:
            raise ValueError(
                f"a continuation has {len(self.given)} tokens that are given and {len(self.predicted)} to predict; "
                "each must be at least 1"
            )

    @property
    def fed(self) -> list[int]:
        """All that goes into the model: the last one to be predicted does not."""
        return [*self.given, *self.predicted][:-1]


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    cache: Cache,
    continuations: Sequence[Continuation],
    attention_mask: Tensor | None = None,
    batch: int = 1,
) -> list[Tensor]:
    """`[n, vocabulary]` for each continuation, the log-probabilities in fp32 at its n predicted tokens.

    Every continuation gets a copy of its row; the cache stays as it is, and nothing is folded for them.

    Args:
        cache: what has read the contexts.
        attention_mask: `[B, L]` of the contexts, where one is padded.
        batch: B.
    """
    at_a_time = max(1, MOST_KEYS // max(1, int(cache.get_seq_length())))
    found: list[Tensor] = []
    for first in range(0, len(continuations), at_a_time):
        found += _predict(model, cache, continuations[first : first + at_a_time], attention_mask, batch)
    return found


def _predict(
    model: PreTrainedModel, cache: Cache, asked: Sequence[Continuation], attention_mask: Tensor | None, batch: int
) -> list[Tensor]:
    device = model.device
    rows = [one.fed for one in asked]
    longest = max(map(len, rows))
    # padded on the right, where nobody looks at it
    ids = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=device)
    options = {}
    if attention_mask is not None and not attention_mask.all():
        of_contexts = attention_mask[[one.row for one in asked]].to(device)
        mask = torch.cat([of_contexts, torch.ones_like(ids)], dim=1)
        options = {"attention_mask": mask}
        if "position_ids" in inspect.signature(model.forward).parameters:
            options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -longest:]
    kept = longest - min(len(one.given) for one in asked) + 1
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = kept
    twin = rows_of(cache, [one.row for one in asked], batch)
    try:
        logits = model(ids, **options, **cache_argument(twin)).logits[:, -kept:]
    finally:
        release(twin)
    ends = [len(row) - longest + kept for row in rows]
    return [
        of_row[end - len(one.predicted) : end].float().log_softmax(dim=-1)
        for of_row, one, end in zip(logits, asked, ends, strict=True)
    ]


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    cache: Cache,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
) -> Tensor:
    """`[B, n]`, what the model generates behind `ids` `[B, L]` without sampling.

    Args:
        cache: what has read their beginning; it goes on to hold what comes after.
        attention_mask: `[B, L]`, where one is padded.
        max_new_tokens: n, at most.
    """
    pad = model.generation_config.pad_token_id
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if attention_mask is None else attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0 if pad is None else pad,
        **cache_argument(cache),
    )
    return output[:, ids.shape[1] :]


def rows_of(cache: Cache, rows: Sequence[int], batch: int, folds: bool = False) -> Cache:
    """A copy of a cache that holds these of its `batch` rows, and folds no more unless it is to."""
    twin = copy.deepcopy(cache)
    if list(rows) != list(range(batch)):
        twin.reorder_cache(torch.tensor(rows))
    if not folds and isinstance(twin, MergingDynamicCache):
        for layer in twin.folding_layers:
            layer.activate_past_recording()
    return twin


def release(cache: Cache) -> None:
    """Leave the model as it was before the cache."""
    if isinstance(cache, MergingDynamicCache):
        cache.release()


def loss(log_probabilities: Tensor, tokens: Sequence[int]) -> float:
    """The mean negative log-likelihood of tokens, in nats each, under `[n, vocabulary]`."""
    index = torch.tensor(tokens, device=log_probabilities.device).unsqueeze(1)
    return -log_probabilities.gather(1, index).mean().item()


def divergence(log_probabilities: Tensor, full: Tensor) -> float:
    """The mean divergence of a cache's distributions `[n, vocabulary]` from the full cache's, in nats for a token."""
    return torch.nn.functional.kl_div(log_probabilities, full, reduction="sum", log_target=True).item() / len(full)


def agrees(log_probabilities: Tensor, tokens: Sequence[int]) -> bool:
    """Whether greedy generation would have given just these tokens."""
    return log_probabilities.argmax(dim=-1).tolist() == list(tokens)
