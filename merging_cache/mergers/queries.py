"""Reference queries: what stands for the queries to come when a merger weighs what a fold changes."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..stage import Stage, option
from ..states import LayerStates, ReferenceQueries, Statistics


class QuerySource(Stage, ABC):
    """Gives a merger the queries by which it weighs a fold."""

    needs_queries = True

    @abstractmethod
    def reference(self, states: LayerStates) -> ReferenceQueries:
        """`n` queries of each query head, or fewer where fewer were observed."""


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

    One query out of every stretch of the prompt, the stretches being as long as leaves `count` to `2 * count` of them.
    Their rotary embedding is taken off, and they are put at the positions after the last token, so that they see all of
    it. Where the rotary embedding cannot be made out, the last `count` queries are taken as they are.

    Memory: `2 * count` queries of every query head until the fold, and after it one in eight, for the next fold.

    Args:
        count: the least number of queries, once as many were observed.
    """

    uses_rotary = True
    query_window = 0

    count: int = option(64, minimum=1)

    def observe(self, states: LayerStates, new: int) -> Statistics:
        first = states.queries.shape[2] - new
        queries, positions = states.queries[:, :, first:], states.query_positions[0, first:]  # rows are alike
        if states.statistics is not None:
            kept, where = self._kept(states.statistics)
            queries, positions = torch.cat([kept, queries], dim=2), torch.cat([where, positions])
        room = 2 * self.count
        if states.rotary is None:
            chosen = torch.arange(len(positions), device=positions.device)[-self.count :]
        else:
            stretch = 1
            while states.seen // stretch > room:
                stretch *= 2  # the last of every two stretches is the last of both, so nothing thrown away is missed
            chosen = (positions % stretch == stretch - 1).nonzero().squeeze(1)
        batch, heads, _, dim = queries.shape
        buffer = queries.new_zeros((batch, heads, room, dim))
        buffer[:, :, : len(chosen)] = queries[:, :, chosen]
        where = positions.new_zeros((batch, heads, room, 1))  # 1 + the position, 0 where there is no query
        where[:, :, : len(chosen), 0] = positions[chosen] + 1
        return Statistics(queries=(buffer, where))

    def reference(self, states: LayerStates) -> ReferenceQueries:
        if states.statistics is None:
            return LastQueries(self.count).reference(states)
        queries, positions = self._kept(states.statistics)
        batch, _, kept, _ = queries.shape
        positions = positions.expand(batch, -1)
        if states.rotary is None:
            return ReferenceQueries(queries, positions)
        ahead = states.positions[..., -1].amax(dim=1, keepdim=True) + 1  # rows are alike
        ahead = ahead + torch.arange(kept, device=queries.device)
        turned = states.rotary.rotated(states.rotary.unrotated(queries, positions), ahead)
        return ReferenceQueries(turned, ahead)

    def settle(self, statistics: Statistics, folded: Tensor) -> Statistics:
        def thinned(kept: Tensor) -> Tensor:
            fewer = kept[:, :, 7::8]  # the last of every eight stretches
            if folded.all():
                return fewer.clone()
            padded = torch.zeros_like(kept)
            padded[:, :, : fewer.shape[2]] = fewer
            return torch.where(folded.view(-1, 1, 1, 1), padded, kept)

        return Statistics(queries=tuple(thinned(kept) for kept in statistics.queries))

    def _kept(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """The queries `[B, Hq, n, D]` kept so far and their positions `[n]`."""
        buffer, where = statistics.queries
        where = where[0, 0, :, 0]  # rows and heads are alike
        return buffer[:, :, where > 0], where[where > 0] - 1


QUERY_SOURCES: dict[str, type[QuerySource]] = {"last": LastQueries, "stratified": StratifiedQueries}


def attention_logits(reference: ReferenceQueries, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """`[B, H, R, S]` in fp32, logits of a group's R queries over keys `[B, H, S, D]`; `bias` `[B, H, S]` added."""
    queries = reference.queries.unflatten(1, (keys.shape[1], -1)).flatten(2, 3).float() * scale
    logits = queries @ keys.float().mT
    return logits if bias is None else logits + bias.float().unsqueeze(2)


def attention_weights(
    reference: ReferenceQueries, keys: Tensor, positions: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """`[B, H, R, S]` in fp32, a group's attention to what it sees of keys `[B, H, S, D]` at `positions` `[B, H, S]`."""
    logits = attention_logits(reference, keys, scale, bias)
    groups = reference.queries.shape[1] // keys.shape[1]
    asked = reference.positions.repeat(1, groups)  # the group's heads one after another, as in `attention_logits`
    hidden = positions.unsqueeze(2) > asked[:, None, :, None]
    return logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1).masked_fill_(hidden, 0.0)
