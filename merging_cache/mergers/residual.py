"""A share of the slots sums up what was evicted; the other survivors stay exact."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..stage import option
from ..states import LayerStates, Slots, Survivors, gather_tokens, top_tokens
from .queries import attention_logits
from .reference import ReferenceMerger, full_attention
from .routing import masses


@dataclass
class ResidualMerger(ReferenceMerger):
    """Residual slots for stretches of evicted tokens (ResKV, arXiv:2607.29591; ZeroMerge, arXiv:2503.10714).

    The worst survivors give up their slots, `share` of those that are not protected, and are evicted too. What is
    evicted is cut into as many stretches, each of as many tokens, in the order of the text. A stretch becomes one slot:
    the mean key and value, weighted by the attention that its tokens draw, and a log-mass: fitted,
    `log(sum_q m_q x_q / sum_q x_q^2)` with m the attention that the stretch draws from each reference query and x that
    of the mean key before any mass; or the logarithm of the number of tokens. The other survivors stay as they are.

    Mean keys are at no position. That was measured to harm real models where tokens are far apart, so stretches are as
    local as the share allows.

    Args:
        queries: see `ReferenceMerger`.
        share: the share of slots for stretches.
        mass: `"fitted"`, or `"count"`, which also weighs the tokens of a stretch alike.

    Raises:
        ValueError: if an option is out of its range.
    """

    has_mass = True

    share: float = option(0.25, minimum=0, maximum=1)
    mass: Literal["fitted", "count"] = "fitted"

    def merge_heads(self, states: LayerStates, survivors: Survivors) -> Slots:
        protected = survivors.protected
        if protected is None:
            protected = torch.zeros_like(survivors.indices, dtype=torch.bool)
        kept = survivors.indices.shape[2]
        stretches = int(self.share * int((~protected).sum(dim=-1).min()))
        if not stretches:
            return Slots.of_survivors(states, survivors)
        stay = Survivors(self._best(survivors, protected, kept - stretches))
        evicted = stay.evicted(states.num_tokens)
        sizes = torch.arange(stretches + 1, device=evicted.device) * evicted.shape[2] // stretches
        lengths = sizes.diff()

        attention = full_attention(states)  # [B, H, R, L]
        mass = masses(states).gather(2, evicted)
        weight = mass if self.mass == "count" else attention.mean(dim=2).gather(2, evicted)
        weight = weight.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        total = _sums(weight, lengths)
        keys, values = (
            _sums(weight * gather_tokens(part, evicted).float(), lengths) / total
            for part in (states.keys, states.values)
        )
        counts = _sums(mass.unsqueeze(-1), lengths).squeeze(-1)
        log_mass = counts.log()
        if self.mass == "fitted":
            index = evicted.unsqueeze(2).expand(-1, -1, attention.shape[2], -1)
            drawn = _sums(attention.gather(3, index).mT, lengths).mT  # [B, H, R, stretches]
            logits = attention_logits(states.reference, states.keys, states.logit_scale, states.log_mass)
            alone = attention_logits(states.reference, keys, states.logit_scale)
            alone = (alone - logits.logsumexp(dim=-1, keepdim=True)).exp()
            tiny = torch.finfo(torch.float32).tiny
            fitted = (drawn * alone).sum(dim=2) / alone.square().sum(dim=2).clamp_min(tiny)
            # no slot stands for less than a hundredth of a token, or for more than all of its tokens and as many again
            log_mass = torch.minimum(fitted.clamp_min(0.01), 2 * counts).log()

        exact = Slots.of_survivors(states, stay)
        named = evicted.gather(2, (sizes[1:] - 1).expand(*evicted.shape[:2], -1))  # the last of each stretch
        own = exact.log_mass if exact.log_mass is not None else torch.zeros_like(exact.positions, dtype=log_mass.dtype)
        tokens, order = torch.cat([stay.indices, named], dim=2).sort(dim=-1)
        return Slots(
            keys=gather_tokens(torch.cat([exact.keys, keys.to(exact.keys.dtype)], dim=2), order),
            values=gather_tokens(torch.cat([exact.values, values.to(exact.values.dtype)], dim=2), order),
            positions=states.positions.gather(2, tokens),
            num_merged=exact.num_merged + evicted.shape[2],
            num_dropped=torch.zeros_like(exact.num_dropped),
            log_mass=torch.cat([own, log_mass], dim=2).gather(2, order),
            tokens=tokens,
        )

    def _best(self, survivors: Survivors, protected: Tensor, count: int) -> Tensor:
        """`[B, H, count]`, the ascending indices of the best survivors, the protected among them."""
        scores = torch.zeros_like(protected, dtype=torch.float32) if survivors.scores is None else survivors.scores
        return survivors.indices.gather(2, top_tokens(scores.masked_fill(protected, torch.inf), count))


def _sums(states: Tensor, lengths: Tensor) -> Tensor:
    """`[B, H, E, ...]` to `[B, H, stretches, ...]`, summed over stretches of these lengths."""
    moved = states.movedim(2, 0)
    flat = moved.reshape(moved.shape[0], -1).contiguous()
    return torch.segment_reduce(flat, "sum", lengths=lengths, axis=0).view(-1, *moved.shape[1:]).movedim(0, 2)
