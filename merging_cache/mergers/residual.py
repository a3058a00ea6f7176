"""A share of the slots sums up what was evicted; the other survivors stay exact."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..stage import option
from ..states import LayerStates, Slots, Survivors, gather_tokens, holders_of, top_tokens
from .queries import attention_logits, softmax_of_seen
from .reference import ReferenceMerger, full_logits
from .routing import Routing, masses, nearest_survivors

LEAST = 1e-20  # attention that no token falls short of, so that every cluster has a mean


@dataclass
class ResidualMerger(ReferenceMerger):
    """Residual slots for clusters of evicted tokens (ResKV, arXiv:2607.29591; ZeroMerge, arXiv:2503.10714).

    The worst survivors give up their slots, `share` of those that are not protected, and are evicted too. What is
    evicted is put into as many clusters. A cluster becomes one slot: the mean key and value, weighted by the attention
    that its tokens draw, and a log-mass: fitted, `log(sum_q m_q x_q / sum_q x_q^2)` with m the attention that the
    cluster draws from each reference query and x that of the mean key before any mass; or the logarithm of the number
    of tokens. The other survivors stay as they are.

    Mean keys are at no position. That was measured to harm real models where tokens are far apart, so by default
    clusters are as local as the share allows.

    Args:
        queries: see `ReferenceMerger`.
        share: the share of slots for clusters.
        clusters: `"positions"`, stretches of the text of as many tokens each; `"keys"`, one for each survivor that
            gives up its slot, of the evicted tokens whose keys are closest to its.
        mass: `"fitted"`, or `"count"`, which also weighs the tokens of a cluster alike.

    Raises:
        ValueError: if an option is out of its range.
    """

    has_mass = True

    share: float = option(0.25, minimum=0, maximum=1)
    clusters: Literal["positions", "keys"] = "positions"
    mass: Literal["fitted", "count"] = "fitted"

    def merge_heads(self, states: LayerStates, survivors: Survivors) -> Slots:
        protected = survivors.protected
        if protected is None:
            protected = torch.zeros_like(survivors.indices, dtype=torch.bool)
        kept = survivors.indices.shape[2]
        count = int(self.share * int((~protected).sum(dim=-1).min()))
        if not count:
            return Slots.of_survivors(states, survivors)
        scores = torch.zeros_like(protected, dtype=torch.float32) if survivors.scores is None else survivors.scores
        best = Survivors(top_tokens(scores.masked_fill(protected, torch.inf), kept - count))
        stay = Survivors(survivors.indices.gather(2, best.indices))
        given_up = survivors.indices.gather(2, best.evicted(kept))
        evicted = stay.evicted(states.num_tokens)
        cluster, named = self._clusters(states.keys, evicted, given_up)

        logits = full_logits(states)
        attention = softmax_of_seen(logits, states.reference)  # [B, H, R, L]
        mass = masses(states).gather(2, evicted)
        weight = mass if self.mass == "count" else attention.mean(dim=2).gather(2, evicted).clamp_min(LEAST)

        def of_clusters(weight: Tensor) -> Routing:
            return Routing(evicted, cluster, similarity=torch.ones_like(weight), weight=weight)

        weighted, counts = of_clusters(weight), of_clusters(mass).totals(count)
        total = weighted.totals(count).unsqueeze(-1)
        keys, values = (weighted.sums(part, count) / total for part in (states.keys, states.values))
        log_mass = counts.log()
        if self.mass == "fitted":
            drawn = of_clusters(torch.ones_like(mass)).sums(attention.mT, count).mT  # [B, H, R, count]
            # only queries that see all of a cluster can tell its mass
            last = torch.zeros_like(given_up).scatter_reduce(2, cluster, states.positions.gather(2, evicted), "amax")
            alone = attention_logits(states.reference, keys, last, states.logit_scale)
            alone = (alone - logits.logsumexp(dim=-1, keepdim=True)).exp().nan_to_num(0.0)
            squares = alone.square().sum(dim=2)
            fitted = (drawn * alone).sum(dim=2) / squares
            # no slot stands for less than a hundredth of a token, or for more than all of its tokens and as many again
            fitted = torch.minimum(fitted.clamp_min(0.01), 2 * counts)
            log_mass = torch.where(squares > 0, fitted, counts).log()

        exact = Slots.of_survivors(states, stay)
        own = exact.log_mass if exact.log_mass is not None else torch.zeros_like(exact.positions, dtype=log_mass.dtype)
        tokens, order = torch.cat([stay.indices, named], dim=2).sort(dim=-1)
        return Slots(
            keys=gather_tokens(torch.cat([exact.keys, keys.to(exact.keys.dtype)], dim=2), order),
            values=gather_tokens(torch.cat([exact.values, values.to(exact.values.dtype)], dim=2), order),
            positions=states.positions.gather(2, tokens),
            num_merged=torch.zeros_like(exact.num_merged) + (evicted.shape[2] - count),
            num_dropped=torch.zeros_like(exact.num_dropped),
            log_mass=torch.cat([own, log_mass], dim=2).gather(2, order),
            tokens=tokens,
            holders=holders_of(
                states,
                torch.cat([stay.indices, evicted], dim=2),
                torch.cat([stay.indices, named.gather(2, cluster)], dim=2),
            ),
        )

    def _clusters(self, keys: Tensor, evicted: Tensor, given_up: Tensor) -> tuple[Tensor, Tensor]:
        """The cluster `[B, H, E]` of every evicted token, and the token `[B, H, count]` each cluster is named after."""
        count, lost = given_up.shape[2], evicted.shape[2]
        if self.clusters == "positions":
            ends = torch.arange(1, count + 1, device=evicted.device) * lost // count
            cluster = torch.searchsorted(ends, torch.arange(lost, device=evicted.device), right=True)
            return cluster.expand_as(evicted).contiguous(), evicted[..., ends - 1]
        centres = torch.searchsorted(evicted, given_up)
        routing = nearest_survivors(gather_tokens(keys, evicted), Survivors(centres), by_distance=True)
        every = torch.arange(count, device=evicted.device).expand_as(centres)
        cluster = torch.empty_like(evicted).scatter_(2, centres, every)
        return cluster.scatter_(2, routing.evicted, routing.target), given_up
