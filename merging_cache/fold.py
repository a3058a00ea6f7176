"""One fold of one layer, from many tokens to few slots: score, allocate, merge, with padding out of everybody's way.

Pure functions of tensors; knows nothing of transformers or of how slots are stored.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .budgets import Budget
from .mergers import Merger
from .scorers import Scorer
from .stage import Stage
from .states import LayerStates, Slots, Statistics, Survivors, holders_of

Observe = Callable[[LayerStates, int], Statistics | None]


@dataclass(frozen=True)
class Fold:
    """A scorer, a budget and a merger applied in turn: `fold(states, num_slots)` gives the `Slots` to store.

    Rows with padding, or that have seen different numbers of tokens, are folded as if they stood alone. Where heads
    have different numbers of tokens or of slots, each is scored and merged as if it were the only one. So scorers and
    mergers see plain rectangles.

    Args:
        scorer: gives every token of every KV head an importance.
        budget: chooses the survivors.
        merger: decides what becomes of the evicted.
        sink_tokens, recent_tokens: how many first and last tokens of each row always keep their slot and take nothing
            in. Where `num_slots` is smaller than both together, sinks go first, then the most recent; some scorers let
            recent tokens have no more than a part of the slots by themselves (`Scorer.recent_share`).
    """

    scorer: Scorer
    budget: Budget
    merger: Merger
    sink_tokens: int = 4
    recent_tokens: int = 32

    def __deepcopy__(self, memo: dict[int, Any]) -> "Fold":
        return self  # immutable, like the config it comes from

    @property
    def stages(self) -> dict[str, Scorer | Budget | Merger]:
        """The three stages by the names of their fields in `MergingConfig`."""
        return {"scorer": self.scorer, "budget": self.budget, "merger": self.merger}

    @property
    def query_window(self) -> int:
        """How many of the last queries some stage wants to see."""
        return max((stage.query_window for stage in self.stages.values() if stage.needs_queries), default=0)

    @property
    def observes(self) -> bool:
        """Whether anything has to be remembered of the passes of a prompt."""
        return any(stage.observes for stage in self.stages.values())

    @property
    def needs_attention(self) -> bool:
        """Whether keys and values are not enough: something is to be seen, or masks are to be fitted."""
        return any(stage.needs_attention for stage in self.stages.values())

    @property
    def needs_hidden_states(self) -> bool:
        """Whether some stage looks at the attention's input."""
        return any(stage.needs_hidden_states for stage in self.stages.values())

    @property
    def needs_outputs(self) -> bool:
        """Whether some stage looks at what is read by the tokens that are read again."""
        return any(stage.needs_outputs for stage in self.stages.values())

    def check_model(self, config: Any, layers: Sequence[int]) -> None:
        """Refuse a model that a stage was not made for; see `Stage.check_model`."""
        for stage in self.stages.values():
            stage.check_model(config, layers)

    # Observing --------------------------------------------------------------------------------------------------------

    def observe(self, states: LayerStates, new: int) -> dict[str, Statistics]:
        """What each stage remembers after a pass whose tokens are the last `new` of `states`; see `Stage.observe`."""
        observed = {
            name: self._observe(stage.observe, states.for_stage(name), new)
            for name, stage in self.stages.items()
            if stage.observes
        }
        return {name: statistics for name, statistics in observed.items() if statistics is not None}

    @property
    def rereading(self) -> dict[str, Stage]:
        """The stages for which the prompt, or a part of it, is read again."""
        return {name: stage for name, stage in self.stages.items() if stage.reads_again}

    @property
    def again_tokens(self) -> int | None:
        """How many tokens from the middle of the prompt are enough for all of them; `None` for all of it."""
        enough = [stage.again_tokens for stage in self.rereading.values()]
        return None if None in enough else max(enough, default=0)

    @property
    def learners(self) -> dict[str, Any]:
        """The stages that learn of the model (`Learner`, or a scorer around one)."""
        return {name: stage for name, stage in self.stages.items() if stage.learns}

    def observe_again(self, states: LayerStates) -> dict[str, Statistics]:
        """What each stage that wants it remembers after tokens were read again; see `Stage.observe_again`."""
        return {name: stage.observe_again(states.for_stage(name)) for name, stage in self.rereading.items()}

    def _observe(self, observe: Observe, states: LayerStates, new: int) -> Statistics | None:
        if states.rows_agree:
            return self._observe_rows(observe, states, new)
        first_new = states.num_tokens - new
        parts = []
        for rows, tokens in states.rows_alike():
            alone = states.select(rows, tokens)
            if len(tokens) and (alone.valid is None or alone.valid.any()):  # a row may be all padding so far
                parts.append((rows, tokens, self._observe_rows(observe, alone, int((tokens >= first_new).sum()))))
        return _assemble_statistics(states, ((rows, slice(None), tokens, part) for rows, tokens, part in parts))

    def _observe_rows(self, observe: Observe, states: LayerStates, new: int) -> Statistics | None:
        if states.valid is None:
            return observe(states, new)
        parts = [(row, heads, tokens, observe(part, new)) for row, heads, tokens, part in states.rectangles()]
        return _assemble_statistics(states, parts)

    # Folding ----------------------------------------------------------------------------------------------------------

    @property
    def fits_masks(self) -> bool:
        """Whether a layer's slots are laid out without regard to the mask that transformers makes for all layers."""
        return self.budget.ragged or self.merger.has_mass

    def is_due(self, num_tokens: int, seen: int, num_slots: int) -> bool:
        """Whether a layer that stores `num_tokens` of `seen` tokens is to be folded, all layers to `num_slots`.

        Where masks are fitted every layer is folded with the others, be it that it keeps all its tokens, so that the
        tail is the same in all of them and no padding is left.
        """
        due = self.budget.may_fold(seen, num_slots)
        return due and (self.fits_masks or self.budget.folds(num_tokens, seen, num_slots))

    def width(self, padding: Tensor | None, num_slots: int) -> int:
        """How many columns of `[B, L]` padding hold `num_slots` real tokens of every row, or all that it has.

        Columns are counted from the last. With padding on the left that is `num_slots` itself.
        """
        if padding is None:
            return num_slots
        real = (~padding).flip(1).cumsum(dim=1)
        short = real < real[:, -1:].clamp_max(num_slots)
        return min(padding.shape[1], max(num_slots, int(short.sum(dim=1).max()) + 1))

    def __call__(self, states: LayerStates, num_slots: int) -> Slots:
        """Fold `[B, H, L, D]` states into `num_slots` slots per head, on average over the layers and heads of a cache.

        Rows that have no more tokens than that keep them all.
        """
        if states.rows_agree:
            return self._fold_rows(states, num_slots)
        if self.fits_masks or states.valid is not None:
            return self._fold_padded_ragged(states, num_slots)
        return self._fold_padded(states, num_slots)

    def _fold_padded(self, states: LayerStates, num_slots: int) -> Slots:
        """Rows with padding into the same number of slots.

        transformers masks the slots of a row with the last columns of its attention mask, so a row has as many slots as
        these columns hold real tokens. `width` columns are enough for every row to get the slots it is due, and a row
        that then has room for more gets more. Padding stays only where the mask hides it.
        """
        last = slice(states.num_tokens - self.width(states.padding, num_slots), None)
        slots = Slots(
            keys=states.keys[:, :, last].clone(),
            values=states.values[:, :, last].clone(),
            positions=states.positions[:, :, last].clone(),
            num_merged=torch.zeros_like(states.positions[:, :, 0]),
            num_dropped=torch.zeros_like(states.positions[:, :, 0]),
            holders=holders_of(states),
        )
        padding = (
            torch.zeros_like(states.positions[:, 0], dtype=torch.bool) if states.padding is None else states.padding
        )
        for rows, tokens in states.rows_alike():
            visible = (~padding[rows[0], last]).nonzero().squeeze(1)
            if len(visible):
                folded = self._fold_rows(states.select(rows, tokens), len(visible))
                slots = slots.write(folded, rows, slice(None), visible)
        return slots

    def _fold_padded_ragged(self, states: LayerStates, num_slots: int) -> Slots:
        """Rows with padding where every row and head may have its own number of slots; no padding is stored."""
        parts = [(rows, slice(None), self._fold_rows(alone, num_slots)) for rows, _, alone in alone_or_alike(states)]
        return _assemble_slots(states, parts)

    def _fold_rows(self, states: LayerStates, num_slots: int) -> Slots:
        """Fold rows without padding."""
        check_finite(states)
        num_tokens, seen = num_tokens_per_head(states), states.seen
        if not self.budget.may_fold(seen, num_slots):
            return _keep_everything(states)
        num_slots = self.budget.layer_slots(num_slots, seen, states.layer_rank)
        if not self.budget.folds(num_tokens, seen, num_slots):
            return _keep_everything(states)
        states = replace(states, num_slots=num_slots)
        scores = self._protect(self._score(states), states, num_slots)
        survivors = self.budget.allocate(scores, states.for_stage("budget"), num_slots)
        if survivors.valid is None and states.valid is None:
            return self._merge(states, survivors, scores)
        return self._merge_kept(states, survivors.mask(states.num_tokens), scores)

    # Folding all layers together, for budgets over layers ------------------------------------------------------------

    def score(self, states: LayerStates, num_slots: Callable[[int], int]) -> tuple[Tensor, Tensor]:
        """Scores `[B, H, L]` to be compared with those of other layers, and how many slots per head each row has `[B]`.

        Infinite for tokens that must stay, and `-inf` where there is none.

        Args:
            num_slots: of the number of tokens that a row has seen.
        """
        scores = torch.full(states.keys.shape[:3], -torch.inf, device=states.keys.device)
        slots = torch.zeros(len(scores), dtype=torch.long)
        heads = torch.arange(scores.shape[1], device=scores.device).view(-1, 1)
        for rows, tokens, alone in alone_or_alike(states):
            check_finite(alone)
            count = num_slots(alone.seen)
            alone = replace(alone, num_slots=count)
            scores[rows.view(-1, 1, 1), heads, tokens] = self._protect(self._score(alone), alone, count)
            slots[rows.cpu()] = count
        return scores, slots

    def keep(self, states: LayerStates, kept: Tensor, scores: Tensor) -> Slots:
        """Fold into the tokens `kept`, `[B, H, L]` bool, which were chosen by these scores."""
        parts = []
        for rows, tokens, alone in alone_or_alike(states):
            mine = (one[rows].index_select(2, tokens) for one in (kept, scores))
            parts.append((rows, slice(None), self._merge_kept(alone, *mine)))
        return _assemble_slots(states, parts)

    def _merge_kept(self, states: LayerStates, kept: Tensor, scores: Tensor) -> Slots:
        """Merge rows without padding into the tokens `kept`, `[B, H, L]` bool."""
        parts, states = [], self.merger.prepared(states.for_stage("merger"))
        for row, heads, tokens, part in states.rectangles(kept.sum(dim=-1)):
            mine = Survivors.of_mask(kept[row, heads].gather(2, tokens.unsqueeze(0)))
            parts.append((row, heads, self._merge(part, mine, scores[row, heads].gather(2, tokens.unsqueeze(0)))))
        return _assemble_slots(states, parts)

    def _merge(self, states: LayerStates, survivors: Survivors, scores: Tensor) -> Slots:
        kept = scores.gather(2, survivors.indices)
        survivors = replace(survivors, protected=kept.isposinf(), scores=kept)
        slots = self.merger.merge(states.for_stage("merger"), survivors)
        tokens = states.remembered.get("scorer", Statistics()).tokens
        if tokens is None:
            return slots
        named = survivors.indices if slots.tokens is None else slots.tokens
        index = named.view(*named.shape, *[1] * (tokens.dim() - 3))
        return replace(slots, statistics=tokens.gather(2, index.expand(-1, -1, -1, *tokens.shape[3:])))

    def _score(self, states: LayerStates) -> Tensor:
        """The scorer's `[B, H, L]` scores in fp32, checked; its own infinities made finite, `-inf` where no slot is."""
        if states.valid is None:
            return self._score_heads(states)
        scores = torch.full(states.keys.shape[:3], -torch.inf, device=states.keys.device)
        for row, heads, tokens, part in states.rectangles():
            scores[row, heads] = scores[row, heads].scatter(2, tokens.unsqueeze(0), self._score_heads(part))
        return scores

    def _score_heads(self, states: LayerStates) -> Tensor:
        name = self.scorer.stage_name
        versions = _versions(states)
        with torch.no_grad():  # which tokens survive has no gradient
            scores = self.scorer.score(states.for_stage("scorer"))
        if _versions(states) != versions:
            raise ValueError(f"scorer {name} changed keys or values in place; they are the cache's own, so copy them")
        if not isinstance(scores, Tensor) or scores.shape != states.keys.shape[:3]:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"scorer {name} returned {got} for keys {tuple(states.keys.shape)}; a scorer returns one score per "
                f"token and KV head, [B, H, L] = {tuple(states.keys.shape[:3])}"
            )
        scores = scores.float()
        if scores.isnan().any():
            raise ValueError(f"scorer {name} returned NaN in layer {states.layer_idx}; scores must be comparable")
        return scores.clamp(torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)

    def _protect(self, scores: Tensor, states: LayerStates, num_slots: int) -> Tensor:
        """Infinite scores for sinks and recent tokens, clipped to `num_slots`."""
        sinks = min(self.sink_tokens, num_slots)
        recent = min(self.recent_tokens, num_slots - sinks, int(num_slots * self.scorer.recent_share))
        if states.valid is None:
            index = torch.arange(scores.shape[2], device=scores.device)
            return scores.masked_fill((index < sinks) | (index >= len(index) - recent), torch.inf)
        index = states.valid.cumsum(dim=-1) - 1
        count = states.valid.sum(dim=-1, keepdim=True)
        return scores.masked_fill(states.valid & ((index < sinks) | (index >= count - recent)), torch.inf)


def alone_or_alike(states: LayerStates) -> Iterator[tuple[Tensor, Tensor, LayerStates]]:
    """Rows that can be folded as one, without padding: their indices, those of their tokens, and their states."""
    if states.rows_agree:
        device = states.keys.device
        yield torch.arange(len(states.keys), device=device), torch.arange(states.num_tokens, device=device), states
        return
    for rows, tokens in states.rows_alike():
        if len(tokens):
            yield rows, tokens, states.select(rows, tokens)


def _versions(states: LayerStates) -> tuple[int, ...]:
    """How often the keys and values were written to; tensors of inference mode do not count."""
    return tuple(states._version for states in (states.keys, states.values) if not states.is_inference())


def num_tokens_per_head(states: LayerStates) -> int:
    """How many tokens each head has on average, in the row that has most, rounded up."""
    if states.valid is None:
        return states.num_tokens
    return int(states.valid.sum(dim=(1, 2)).max().div(states.keys.shape[1]).ceil())


def check_finite(states: LayerStates) -> None:
    """Refuse to fold NaN or infinite states: they would spread to every survivor they are merged into."""
    for name, tensor in (("keys", states.keys), ("values", states.values)):
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(
                f"layer {states.layer_idx} has non-finite {name} (NaN or infinity) and cannot be folded; the model "
                f"overflowed in {tensor.dtype}: load it in bfloat16 or float32, or look at its inputs"
            )


def _keep_everything(states: LayerStates) -> Slots:
    every = torch.arange(states.num_tokens, device=states.keys.device).expand(states.positions.shape)
    slots = Slots.of_survivors(states, Survivors(every))
    tokens = states.remembered.get("scorer", Statistics()).tokens
    return replace(slots, valid=states.valid, statistics=tokens)


def _assemble_slots(states: LayerStates, parts: list[tuple[Tensor, slice, Slots]]) -> Slots:
    """Slots of rows and heads that have different numbers of them, the existing ones last."""
    longest = max((part.keys.shape[2] for _, _, part in parts), default=0)
    slots = Slots.empty(states, longest)
    for rows, heads, part in parts:
        columns = torch.arange(longest - part.keys.shape[2], longest, device=rows.device)
        slots = slots.write(part, rows, heads, columns)
    return slots


def _assemble_statistics(
    states: LayerStates, parts: Iterable[tuple[Tensor, slice, Tensor, Statistics | None]]
) -> Statistics | None:
    """Statistics of rows and heads that were observed apart: `(rows, heads, tokens, statistics)`."""
    batch, num_heads = states.keys.shape[:2]
    tokens_of_all: Tensor | None = None
    queries_of_all: tuple[Tensor, ...] = ()
    for rows, heads, tokens, part in parts:
        if part is None:
            return None
        every_head = torch.arange(num_heads, device=rows.device)[heads]
        tokens = tokens.view(1, -1, tokens.shape[-1])  # of all these heads, or of each
        if part.tokens is not None:
            if tokens_of_all is None:
                shape = (batch, num_heads, states.num_tokens, *part.tokens.shape[3:])
                tokens_of_all = part.tokens.new_zeros(shape)
            tokens_of_all[rows.view(-1, 1, 1), every_head.view(1, -1, 1), tokens] = part.tokens
        if not part.queries:
            continue
        group = part.queries[0].shape[1] // len(every_head)
        if not queries_of_all:
            queries_of_all = tuple(q.new_zeros((batch, num_heads * group, *q.shape[2:])) for q in part.queries)
        query_heads = (every_head.view(-1, 1) * group + torch.arange(group, device=rows.device)).view(1, -1)
        for whole, mine in zip(queries_of_all, part.queries, strict=True):
            whole[rows.view(-1, 1), query_heads] = mine
    return None if tokens_of_all is None and not queries_of_all else Statistics(tokens_of_all, queries_of_all)
