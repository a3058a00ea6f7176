"""Values spread over the survivors that follow."""

from dataclasses import dataclass, replace

import torch

from ..stage import option
from ..states import LayerStates, Slots, Survivors, count_evicted
from .reference import ReferenceMerger, full_attention
from .routing import Routing


@dataclass
class CAMMerger(ReferenceMerger):
    """Cache merging by attention ratio (CaM, Zhang et al., ICML 2024), in expectation instead of by chance.

    With A the mean attention of the reference queries, the value of an evicted token i is added to the next m <=
    `window` survivors that take anything in: `v_j <- v_j + p_i v_i / m`, `p_i = min(1, A_i / mean(A_j))` over these.
    The original draws from a Bernoulli distribution with p_i. No mass is kept, keys stay as they are.

    Args:
        queries: see `ReferenceMerger`.
        window: over how many survivors a value is spread.

    Raises:
        ValueError: if `window` is below 1.
    """

    window: int = option(32, minimum=1)

    def merge_heads(self, states: LayerStates, survivors: Survivors) -> Slots:
        drawn = full_attention(states).mean(dim=2)  # [B, H, L]
        takes = torch.ones_like(survivors.indices, dtype=torch.bool)
        if survivors.protected is not None:
            takes = ~survivors.protected
        evicted = survivors.evicted(states.num_tokens)
        # the survivors that take something in, numbered; how many of them, and of their attention, come before each
        before = torch.nn.functional.pad(takes.cumsum(dim=-1), (1, 0))
        attention = drawn.gather(2, survivors.indices).double() * takes
        first = before.gather(2, torch.searchsorted(survivors.indices.contiguous(), evicted))
        last = torch.minimum(first + self.window, before[..., -1:])
        order = (~takes).to(torch.uint8).sort(dim=-1, stable=True).indices  # those that take first
        summed = torch.nn.functional.pad(attention.gather(2, order).cumsum(dim=-1), (1, 0))
        count = last - first
        mean = (summed.gather(2, last) - summed.gather(2, first)) / count.clamp_min(1)
        share = (drawn.gather(2, evicted) / mean.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0).float()
        weight = torch.where(count > 0, share / count.clamp_min(1), 0.0)

        def sums_from(start: torch.Tensor) -> torch.Tensor:
            return Routing(evicted, start, share, weight).sums(states.values, survivors.indices.shape[2] + 1)

        # a value is in the sum from the first of its survivors to the last
        running = (sums_from(first) - sums_from(last)).cumsum(dim=2)
        number = before[..., :-1].unsqueeze(-1).expand(-1, -1, -1, running.shape[-1])
        added = running.gather(2, number) * takes.unsqueeze(-1)
        slots = Slots.of_survivors(states, survivors)
        num_merged, num_dropped = count_evicted(states, evicted, weight > 0)
        values = (slots.values.float() + added).to(slots.values.dtype)
        nearest = Routing(evicted, order.gather(2, first.clamp_max(order.shape[2] - 1)), share, weight)
        holders = nearest.holders(states, survivors)
        return replace(slots, values=values, num_merged=num_merged, num_dropped=num_dropped, holders=holders)
