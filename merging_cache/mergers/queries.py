"""Reference queries: what stands for the queries to come when a merger weighs what a fold changes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..stage import Stage, option
from ..states import LayerStates, ReferenceQueries, Statistics, gather_tokens


class QuerySource(Stage, ABC):
    """Gives a merger the queries by which it weighs a fold."""

    needs_queries = True

    @abstractmethod
    def reference(self, states: LayerStates) -> ReferenceQueries:
        """The queries, at least one if any was observed.

        Rows may have different numbers of them: a position of -1 says that there is none, which then sees nothing.
        """


@dataclass
class LastQueries(QuerySource):
    """The last `count` queries, as they were and where they were. They see nothing that is later than they are.

    Memory: `count` queries of every query head.
    """

    count: int = option(32, minimum=1)

    @property
    def query_window(self) -> int:
        return self.count

    def reference(self, states: LayerStates) -> ReferenceQueries:
        first = max(0, states.queries.shape[2] - self.count)
        return ReferenceQueries(states.queries[:, :, first:], states.query_positions[:, first:])


@dataclass
class StratifiedQueries(QuerySource):
    """Queries from all over the prompt, turned to the next positions (GRKV, arXiv:2605.31105).

    Every d-th of the queries observed, d being the smallest power of two that leaves at most `2 * count` of them. Their
    rotary embedding is taken off, and they are put at the positions after the last token, so that they see all of it.
    Where the rotary embedding cannot be made out, the last `count` queries are taken as they are.

    Memory: `2 * count` queries of every query head until the fold; more of them gained nothing on real weights and take
    longer. None are kept after it, so that a cache is no larger than its slots: a later fold is judged by the queries
    that came since, and a prompt that is folded in many chunks by those of each chunk.

    Args:
        count: the least number of queries, once as many were observed.
    """

    uses_rotary = True
    query_window = 0

    count: int = option(32, minimum=1)

    def observe(self, states: LayerStates, new: int) -> Statistics:
        observed = _KeptQueries.after(states, new)
        chosen = observed.last(self.count) if states.rotary is None else observed.evenly(2 * self.count)
        return observed.pick(chosen, 2 * self.count).statistics()

    def settle(self, statistics: Statistics, folded: Tensor) -> Statistics:
        observed = _KeptQueries.of(statistics)
        folded = folded.to(observed.total.device)
        left = (observed.order > 0) & ~folded.unsqueeze(1)
        counted = replace(observed, total=observed.total.masked_fill(folded, 0))
        return counted.pick(left, int(left.sum(dim=1).max())).statistics()

    def reference(self, states: LayerStates) -> ReferenceQueries:
        if states.statistics is None:
            return LastQueries(self.count).reference(states)
        observed = _KeptQueries.of(states.statistics)
        known = observed.order > 0
        observed = observed.pick(known, int(known.sum(dim=1).max()))
        queries, positions = observed.queries, observed.positions.long()
        if states.rotary is not None:
            ahead = states.positions[..., -1].amax(dim=1, keepdim=True) + 1
            ahead = ahead + torch.arange(queries.shape[2], device=queries.device)
            queries = states.rotary.rotated(states.rotary.unrotated(queries, positions), ahead)
            positions = ahead
        known = observed.order > 0
        see_all = states.rotary is not None and bool(known.all())
        return ReferenceQueries(queries, positions.masked_fill(~known, -1), see_all)


@dataclass(frozen=True)
class _KeptQueries:
    """Some of the queries that were observed so far.

    Args:
        queries: `[B, Hq, n, D]`.
        positions: `[B, n]`, where they are.
        order: `[B, n]`, which of all observed queries they are: 1 is the first, 0 stands for none.
        total: `[B]`, how many were observed.
    """

    queries: Tensor
    positions: Tensor
    order: Tensor
    total: Tensor

    @classmethod
    def of(cls, statistics: Statistics) -> "_KeptQueries":
        """What `statistics` made of it: there everything is said for every query head."""
        queries, where, total = statistics.queries
        return cls(queries, where[:, 0, :, 0], where[:, 0, :, 1], total[:, 0, 0])

    def statistics(self) -> Statistics:
        heads = self.queries.shape[1]
        where = torch.stack([self.positions, self.order], dim=-1).unsqueeze(1).expand(-1, heads, -1, -1)
        return Statistics(queries=(self.queries, where.contiguous(), self.total.view(-1, 1, 1).expand(-1, heads, 1)))

    @classmethod
    def after(cls, states: LayerStates, new: int) -> "_KeptQueries":
        """What was kept before a pass, and all queries of the pass."""
        batch, _, last, _ = states.queries.shape
        queries = states.queries[:, :, last - new :]
        positions = states.query_positions[:, last - new :].expand(batch, -1).int()
        order = torch.arange(1, new + 1, dtype=torch.int32, device=queries.device).expand(batch, -1)
        total = torch.full((batch,), new, dtype=torch.int32, device=queries.device)
        if states.statistics is None:
            return cls(queries, positions, order, total)
        before = cls.of(states.statistics)
        return cls(
            torch.cat([before.queries, queries], dim=2),
            torch.cat([before.positions, positions], dim=1),
            torch.cat([before.order, order + before.total.unsqueeze(1)], dim=1),
            before.total + total,
        )

    def last(self, count: int) -> Tensor:
        """`[B, n]` bool, those that are among the last `count` that were observed."""
        return (self.order > 0) & (self.order > self.total.unsqueeze(1) - count)

    def evenly(self, room: int) -> Tensor:
        """`[B, n]` bool, those that are among every d-th observed, d the smallest power of two that leaves `room`.

        What a larger d chooses was chosen by all smaller ones before it, so nothing thrown away is missed.
        """
        powers = 2 ** torch.arange(31, dtype=torch.int32, device=self.total.device)
        fits = self.total.unsqueeze(1) // powers <= room
        distance = powers[fits.int().argmax(dim=1)].unsqueeze(1)  # the first that fits
        return (self.order > 0) & (self.order % distance == 0)

    def pick(self, chosen: Tensor, room: int) -> "_KeptQueries":
        """Those where `chosen` `[B, n]`, in `room` places of which the last may stay empty."""
        index = (~chosen).to(torch.uint8).sort(dim=1, stable=True).indices[:, :room]
        known = chosen.gather(1, index)
        empty = room - index.shape[1]
        queries = gather_tokens(self.queries, index.unsqueeze(1).expand(-1, self.queries.shape[1], -1))
        queries = queries.masked_fill(~known[:, None, :, None], 0.0)
        positions, order = (one.gather(1, index).masked_fill(~known, 0) for one in (self.positions, self.order))
        return _KeptQueries(
            pad(queries, (0, 0, 0, empty)), pad(positions, (0, empty)), pad(order, (0, empty)), self.total
        )


QUERY_SOURCES: dict[str, type[QuerySource]] = {"last": LastQueries, "stratified": StratifiedQueries}


def attention_logits(
    reference: ReferenceQueries, keys: Tensor, positions: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """`[B, H, R, S]` in fp32, logits of a group's R queries over keys `[B, H, S, D]`, `-inf` where they see none.

    They see what is at `positions` `[B, H, S]` up to their own. `bias` `[B, H, S]` is added. In memory each key's are
    together: what is made of them takes half the time then, and each token's attention can be gathered.
    """
    groups = reference.queries.shape[1] // keys.shape[1]
    queries = reference.queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3).float() * scale
    logits = (keys.float() @ queries.mT).mT
    if bias is not None:
        logits += bias.float().unsqueeze(2)
    if reference.see_all:
        return logits
    asked = reference.positions.repeat(1, groups)  # the group's heads one after another, as in `queries`
    return logits.masked_fill_(positions.unsqueeze(2) > asked[:, None, :, None], -torch.inf)


def softmax_of_seen(logits: Tensor, reference: ReferenceQueries) -> Tensor:
    """The softmax over the last dimension of `attention_logits`, 0 where a query sees nothing at all."""
    attention = logits.mT.softmax(dim=-2)
    return (attention if reference.see_all else attention.nan_to_num_(nan=0.0)).mT  # of nothing but -inf there is none
