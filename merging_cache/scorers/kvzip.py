"""Tokens that the model looks at when it reads the context once more."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import option
from ..states import TILE, LayerStates, Statistics
from .attention import group_logits
from .base import Scorer, remembered
from .critical_kv import projected_norms


@dataclass
class KVzipScorer(Scorer):
    """The largest attention that a token draws while the model reads the context again (KVzip, arXiv:2505.23416).

    After the prompt, and before anything is generated, the cache has the model read its tokens once more behind it, in
    chunks that see all of the context and themselves. No instruction stands in front of them. The score is the maximum
    over the tokens read again and the query heads of the group, of the softmax over the context and the chunk. It takes
    about as long as the prompt itself. In later turns only what came since is read again; earlier tokens keep the
    larger of both scores.

    Args:
        chunk_size: tokens that are read again at a time: with more of them it takes more memory and less time.
        plus: weigh the attention by what it adds to the output: by the length of the value after its part of the output
            projection, over that of the attention's input where the token is read again (KVzip+, arXiv:2601.07891).

    Raises:
        ValueError: when scoring with `plus`, if the attention module has no output projection that fits.
    """

    reads_again = True
    default_budget = "global"

    chunk_size: int = option(2048, minimum=1)
    plus: bool = False

    @property
    def needs_hidden_states(self) -> bool:
        return self.plus

    @property
    def needs_module(self) -> bool:
        return self.plus

    def observe_again(self, states: LayerStates) -> Statistics:
        best = remembered(states)
        added = projected_norms(states, 2) if self.plus else None
        for weights in again_tiles(states):
            drawn = weights.amax(dim=3)  # [B, H, G, L]
            best = torch.maximum(best, (drawn if added is None else drawn * added).amax(dim=2))
        return Statistics(tokens=best)

    def score(self, states: LayerStates) -> Tensor:
        return states.statistics.tokens


def again_tiles(states: LayerStates) -> Iterator[Tensor]:
    """`[B, H, G, m, L]` in fp32, the softmax weights over the L stored tokens of m queries at a time.

    They are the queries of tokens that are read again, which see all that is stored and, of themselves, those before
    them and their own; over the lengths of the attention's input where these are known. Caps on the logits and learned
    sinks, which a few models have, are left out.
    """
    batch, heads, length = states.keys.shape[:3]
    queries = states.queries.unflatten(1, (heads, -1)).float() * states.logit_scale
    stored, own = states.keys.float(), states.again.keys.float()
    index = torch.arange(own.shape[2], device=own.device)
    step = max(1, TILE // (batch * queries.shape[1] * queries.shape[2] * (length + own.shape[2])))
    for start in range(0, queries.shape[3], step):
        asking = queries[:, :, :, start : start + step]
        over_stored, over_own = group_logits(asking, stored), group_logits(asking, own)
        if states.log_mass is not None:
            over_stored += states.log_mass[:, :, None, None]
        later = index > index[start : start + step, None]
        over_own = over_own.masked_fill_(later, -torch.inf).logsumexp(dim=-1)
        total = torch.logaddexp(over_stored.logsumexp(dim=-1), over_own)
        if states.again.norms is not None:
            total += states.again.norms[:, None, None, start : start + step].log()
        yield over_stored.sub_(total.unsqueeze(-1)).exp_()
