"""What goes into a fold: everything that a layer knows about its tokens, as plain tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

TILE = 1 << 22  # elements of an intermediate result that stages hold at a time: 16 MiB in fp32


@dataclass(frozen=True)
class Statistics:
    """What a stage remembers of the passes it observed (see `Stage.observe`).

    Args:
        tokens: `[B, H, L, ...]`, numbers kept per stored token: survivors keep theirs, the evicted lose theirs.
        queries: tensors `[B, Hq, ...]` about all queries so far, such as sums over them.
    """

    tokens: Tensor | None = None
    queries: tuple[Tensor, ...] = ()

    def select(self, rows: Tensor | slice, tokens: Tensor | None = None) -> "Statistics":
        """Of these `rows` (indices, or a slice), and of these `tokens` (indices) where any are named."""
        mine = None if self.tokens is None else self.tokens[rows]
        if mine is not None and tokens is not None:
            mine = mine.index_select(2, tokens)
        return Statistics(mine, tuple(tensor[rows] for tensor in self.queries))

    def of_heads(self, heads: slice, num_heads: int) -> "Statistics":
        """Of these of the `num_heads` KV heads."""
        tokens = None if self.tokens is None else self.tokens[:, heads]
        return Statistics(tokens, tuple(readers_of(tensor, heads, num_heads) for tensor in self.queries))

    def resized(self, length: int) -> "Statistics":
        """With room for `length` tokens: zeros for new ones, or without the last ones."""
        if self.tokens is None or self.tokens.shape[2] == length:
            return self
        kept = self.tokens[:, :, :length]
        new = kept.new_zeros((*kept.shape[:2], length - kept.shape[2], *kept.shape[3:]))
        return replace(self, tokens=torch.cat([kept, new], dim=2))

    def placed(self, tokens: Tensor, length: int) -> "Statistics":
        """At these indices of `length` tokens, of which the others have zeros."""
        if self.tokens is None:
            return self
        whole = self.tokens.new_zeros((*self.tokens.shape[:2], length, *self.tokens.shape[3:]))
        return replace(self, tokens=whole.index_copy_(2, tokens, self.tokens))

    @property
    def is_something(self) -> bool:
        """Whether there are any."""
        return self.tokens is not None or bool(self.queries)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return (self.queries[0] if self.tokens is None else self.tokens).device

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (self.tokens, *self.queries) if tensor is not None)


@dataclass(frozen=True)
class ReferenceQueries:
    """Queries that stand for those to come: what a fold changes is judged by what it changes for them.

    Args:
        queries: `[B, Hq, n, D]`, after RoPE.
        positions: `[B, n]`, where they are in the row; they see the tokens up to there.
        see_all: whether that is every token there is.
        attention: `[B, H, G * n, L]`, what they attend to before the fold, where it was computed.
    """

    queries: Tensor
    positions: Tensor
    see_all: bool = False
    attention: Tensor | None = None

    def of_row(self, row: slice) -> "ReferenceQueries":
        """Those of one row."""
        attention = None if self.attention is None else self.attention[row]
        return replace(self, queries=self.queries[row], positions=self.positions[row], attention=attention)

    def pick(self, index: Tensor) -> "ReferenceQueries":
        """Only those of these indices."""
        return ReferenceQueries(self.queries[:, :, index], self.positions[:, index], self.see_all)

    def of_heads(self, heads: slice, num_heads: int) -> "ReferenceQueries":
        """Of those that read these of the `num_heads` KV heads."""
        attention = None if self.attention is None else self.attention[:, heads]
        return replace(self, queries=readers_of(self.queries, heads, num_heads), attention=attention)


@dataclass(frozen=True)
class Again:
    """Some tokens that are read again behind what is stored.

    Args:
        weights: `[B, H, G, m, L]`, what each of m tokens gives of its attention to each stored token, for the G query
            heads that read a KV head, as the model's own attention computes it; 0 where there is no such token.
        norms: `[B, m]`, the length of the attention's input for each of the m, where a stage asked for that.
        outputs: `[B, H, G, m, D]`, what each query head reads by all of its weights, where a stage asked for that.
        lengths: `[B, m]`, the length of what the whole layer then adds.
        projected: the values that the weights are for, as the layer's output projection sees them.
    """

    weights: Tensor
    norms: Tensor | None = None
    outputs: Tensor | None = None
    lengths: Tensor | None = None
    projected: Any = None  # a `Projected`, which knows these records

    @cached_property
    def changes(self) -> Tensor:
        """`[B, H, L]`, see `changes_left_out`; once for all stages that ask."""
        return self.projected.changes(self)


@dataclass(frozen=True)
class LayerStates:
    """Everything one attention layer knows about its tokens when it folds.

    Scorers and mergers called by a cache never meet padding, nor heads of different lengths: rows and heads are handed
    over without (see `fold.py`), so a scorer can be written as if every row were alone.

    Args:
        keys: `[B, H, L, D]`, after RoPE, in the model's precision.
        values: `[B, H, L, D]`.
        positions: `[B, H, L]`, the position of each token in its row (padding not counted), ascending. `None` numbers
            the tokens 0 to L - 1.
        log_mass: `[B, H, L]`, added to a slot's attention logits where earlier folds gave it mass, or `None`.
        padding: `[B, L]` bool, True where the token is padding, or `None` where there is none.
        valid: `[B, H, L]` bool, False where a head has no such slot, or `None` where heads have as many.
        queries: `[B, Hq, n, D]` observed queries after RoPE, oldest first, or `None`. Query heads `h * G` to
            `h * G + G - 1` read KV head `h`, with `G = Hq / H`.
        query_positions: `[B, n]` (or `[n]` where rows agree), their positions; negative where one is padding.
        again: what tokens that are read again attend to, for `observe_again`; else `None`.
        hidden_states: `[B, q, hidden]`, the attention's input for the newest tokens, or `None`.
        statistics: what the stage that is called has observed, see `Stage.observe`.
        remembered: what each stage has, by the stage's name: `"scorer"`, `"merger"`.
        reference: queries to judge a fold by, where a merger hands them to another.
        module: the attention module, where the model is known.
        scaling: the factor on the attention logits; `None` for `1 / sqrt(D)`.
        rotary: the layer's rotary embedding, where a stage asked for it.
        layer_idx: the layer's index in the model.
        layer_rank: `(i, n)`, this is folding layer `i` of `n`, or `None` where that is not known.
        heads: `[H]`, which of the layer's KV heads these are, or `None` for all of them in order.
        num_heads: how many KV heads the layer has, where these are not all of them.
        lesson: `[B or 1, H, ...]`, what the stage that is called has learned of the model, see `Learner`, or `None`.
        lessons: what each stage has, by the stage's name.
        num_slots: how many slots per head the layer is about to be folded to, or `None` where it is not.
        traced: whether mergers are to tell where every token went (`Slots.holders`).
        known_seen: how many tokens every row has seen, where no row has padding and that is known without asking the
            device, which a GPU would have to finish its work for; else `None`.

    Raises:
        ValueError: if keys, values, positions or padding do not fit together.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    log_mass: Tensor | None = None
    padding: Tensor | None = None
    valid: Tensor | None = None
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    again: Again | None = None
    hidden_states: Tensor | None = None
    statistics: Statistics | None = None
    remembered: Mapping[str, Statistics] = field(default_factory=dict)
    reference: "ReferenceQueries | None" = None
    module: torch.nn.Module | None = None
    scaling: float | None = None
    rotary: Any = None
    layer_idx: int | None = None
    layer_rank: tuple[int, int] | None = None
    heads: Tensor | None = None
    num_heads: int | None = None
    lesson: Tensor | None = None
    lessons: Mapping[str, Tensor] = field(default_factory=dict)
    num_slots: int | None = None
    traced: bool = False
    known_seen: int | None = None

    def __post_init__(self) -> None:
        batch, heads, length = self.keys.shape[:3]
        if self.values.shape[:3] != (batch, heads, length):
            raise ValueError(f"keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)} do not fit together")
        if self.positions is None:
            counted = torch.arange(length, device=self.keys.device).expand(batch, heads, length)
            object.__setattr__(self, "positions", counted)
        elif self.positions.shape != (batch, heads, length):
            raise ValueError(f"positions are {tuple(self.positions.shape)}, expected {(batch, heads, length)}")
        if self.padding is not None and self.padding.shape != (batch, length):
            raise ValueError(f"padding is {tuple(self.padding.shape)}, expected {(batch, length)}")
        if self.query_positions is not None and self.query_positions.dim() == 1:
            object.__setattr__(self, "query_positions", self.query_positions.expand(batch, -1))

    @property
    def num_tokens(self) -> int:
        """L, the number of stored tokens of every row and head."""
        return self.keys.shape[2]

    @property
    def group_size(self) -> int:
        """G, the number of query heads that read each KV head."""
        return self.queries.shape[1] // self.keys.shape[1]

    @property
    def seen(self) -> int:
        """Tokens seen by every row, padding not counted (where rows differ, by the one that has seen most)."""
        if self.known_seen is not None:
            return self.known_seen
        return int(self.positions[..., -1].max()) + 1

    @property
    def logit_scale(self) -> float:
        """The factor on the attention logits."""
        return self.keys.shape[3] ** -0.5 if self.scaling is None else self.scaling

    def for_stage(self, name: str) -> "LayerStates":
        """As the stage of this name sees it, with its own statistics and lesson."""
        return replace(self, statistics=self.remembered.get(name), lesson=self.lessons.get(name))

    def select(self, rows: Tensor, tokens: Tensor) -> "LayerStates":
        """The states of these `rows` (indices) and `tokens` (indices, ascending), without padding.

        Of the queries those stay that are real in the first of the rows; call it for rows that are padded alike.
        """

        def take(tensor: Tensor) -> Tensor:
            return tensor[rows].index_select(2, tokens)

        queries, query_positions, hidden = self.queries, self.query_positions, self.hidden_states
        asked: Tensor | slice = slice(None)
        if queries is not None:
            asked = (query_positions[rows[0]] >= 0).nonzero().squeeze(1)
            queries, query_positions = queries[rows][:, :, asked], query_positions[rows][:, asked]
        if hidden is not None:
            newest = tokens - (self.num_tokens - hidden.shape[1])
            hidden = hidden[rows].index_select(1, newest[newest >= 0])
        return self._of_tokens(
            take,
            valid=None if self.valid is None else take(self.valid),
            lessons={name: rows_of(one, rows) for name, one in self.lessons.items()},
            queries=queries,
            query_positions=query_positions,
            hidden_states=hidden,
            statistics=None if self.statistics is None else self.statistics.select(rows, tokens),
            remembered={name: one.select(rows, tokens) for name, one in self.remembered.items()},
        )

    def at(self, tokens: Tensor) -> "LayerStates":
        """Only the stored tokens of these indices; padding is not told of."""

        def take(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.index_select(2, tokens)

        remembered = {name: one.select(slice(None), tokens) for name, one in self.remembered.items()}
        return self._of_tokens(take, valid=take(self.valid), remembered=remembered)

    def of_heads(self, heads: slice) -> "LayerStates":
        """Only these KV heads, with the query heads that read them."""
        count = self.keys.shape[1]
        every = torch.arange(count, device=self.keys.device) if self.heads is None else self.heads
        return self._of_tokens(
            lambda tensor: tensor[:, heads],
            valid=None if self.valid is None else self.valid[:, heads],
            queries=None if self.queries is None else readers_of(self.queries, heads, count),
            statistics=None if self.statistics is None else self.statistics.of_heads(heads, count),
            remembered={name: one.of_heads(heads, count) for name, one in self.remembered.items()},
            lessons={name: one[:, heads] for name, one in self.lessons.items()},
            reference=None if self.reference is None else self.reference.of_heads(heads, count),
            heads=every[heads],
            num_heads=count if self.num_heads is None else self.num_heads,
        )

    def _of_tokens(self, take: Callable[[Tensor], Tensor], **others: Any) -> "LayerStates":
        """With what `take` makes of tensors `[B, H, L, ...]`, without padding, and the `others` as they are given."""
        log_mass = None if self.log_mass is None else take(self.log_mass)
        keys, values, positions = take(self.keys), take(self.values), take(self.positions)
        return replace(self, keys=keys, values=values, positions=positions, log_mass=log_mass, padding=None, **others)

    @property
    def rows_agree(self) -> bool:
        """Whether no row has padding and all have seen equally many tokens, so that they can be folded as one."""
        if self.known_seen is not None:
            return True
        asked = self.query_positions is None or bool((self.query_positions >= 0).all())
        last = self.positions[..., -1].amax(dim=1)
        return self.padding is None and asked and bool((last == last[0]).all())

    def rows_alike(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Groups of rows with the same padding and as many tokens seen: their indices, and those of the real tokens."""
        padding, last = self.padding, self.positions[..., -1].amax(dim=1, keepdim=True)
        if padding is None:
            padding = torch.zeros_like(self.positions[:, 0], dtype=torch.bool)
        pattern = [padding.long(), last]
        if self.query_positions is not None:
            pattern.append((self.query_positions < 0).long())
        patterns, pattern_of_row = torch.unique(torch.cat(pattern, dim=1), dim=0, return_inverse=True)
        for index, one in enumerate(patterns):
            yield (pattern_of_row == index).nonzero().squeeze(1), (one[: padding.shape[1]] == 0).nonzero().squeeze(1)

    def rectangles(self, kept: Tensor | None = None) -> Iterator[tuple[Tensor, slice, Tensor, "LayerStates"]]:
        """What is stored, in parts without gaps: each row if its heads store equally many tokens, else each head.

        Args:
            kept: `[B, H]`, a number in which the heads of a row have to agree, too.

        Yields:
            `(row, heads, tokens, states)`: `[1]`, a slice, and `[H, L]`, the indices of the tokens here of each head.
        """
        device, valid = self.positions.device, self.valid
        every = torch.arange(self.num_tokens, device=device).expand(self.positions.shape)
        stored = torch.zeros_like(every[..., 0]) if valid is None else valid.sum(-1)
        counts = stored.unsqueeze(-1) if kept is None else torch.stack([stored, kept], dim=-1)
        alike_rows = (counts == counts[:, :1]).flatten(1).all(dim=1).tolist()
        for row, alike in enumerate(alike_rows):
            here = torch.tensor([row], device=device)
            whole = self._row(row)
            parts = [slice(None)] if alike else [slice(head, head + 1) for head in range(every.shape[1])]
            for heads in parts:
                part = whole if alike else whole.of_heads(heads)
                if valid is None:
                    yield here, heads, every[row, heads], part
                    continue
                tokens = valid[row, heads].nonzero()[:, 1].view(len(valid[row, heads]), -1)
                yield here, heads, tokens, part._stored(tokens)

    def _row(self, row: int) -> "LayerStates":
        """One row of the batch, as a batch of one."""
        only = slice(row, row + 1)

        def take(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[only]

        return self._of_tokens(
            lambda tensor: tensor[only],
            valid=take(self.valid),
            queries=take(self.queries),
            query_positions=take(self.query_positions),
            hidden_states=take(self.hidden_states),
            statistics=None if self.statistics is None else self.statistics.select(only),
            remembered={name: one.select(only) for name, one in self.remembered.items()},
            lessons={name: rows_of(one, only) for name, one in self.lessons.items()},
            reference=None if self.reference is None else self.reference.of_row(only),
        )

    def _stored(self, tokens: Tensor) -> "LayerStates":
        """Of one row, the tokens `[H, L]` that each head stores, equally many."""

        def take(tensor: Tensor) -> Tensor:
            index = tokens.view(1, *tokens.shape, *[1] * (tensor.dim() - 3))
            return tensor.gather(2, index.expand(-1, -1, -1, *tensor.shape[3:]))

        def of_tokens(statistics: Statistics) -> Statistics:
            return statistics if statistics.tokens is None else replace(statistics, tokens=take(statistics.tokens))

        return self._of_tokens(
            take,
            valid=None,
            statistics=None if self.statistics is None else of_tokens(self.statistics),
            remembered={name: of_tokens(one) for name, one in self.remembered.items()},
        )


def rows_of(lesson: Tensor, rows: Tensor | slice) -> Tensor:
    """Of `[B or 1, ...]` these rows; one may stand for all."""
    if len(lesson) == 1:
        return lesson
    return lesson[rows if isinstance(rows, slice) else rows.to(lesson.device)]


def readers_of(tensor: Tensor, heads: slice, num_heads: int) -> Tensor:
    """Of `[B, Hq, ...]` the query heads that read these of the `num_heads` KV heads."""
    return tensor.unflatten(1, (num_heads, -1))[:, heads].flatten(1, 2)
