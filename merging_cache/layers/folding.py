"""FoldingLayer: how one attention layer is folded, out of what it stores and has observed.

Knows nothing of how tokens are scored, chosen and merged (`fold.py`), nor of when it is time (`merging.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..budgets import Budget
from ..fold import check_finite
from ..mergers import Merger
from ..scorers import Scorer
from ..states import Again, LayerStates, Projected, Slots, Statistics, Tally
from ..storage import store
from .guards import Guards
from .joint import JointFold, Scored
from .observed import Observed, by_stored_head
from .shared import Shared
from .stored import StoredLayer


class FoldingLayer(StoredLayer):
    """A full-attention layer that can be folded: alone, or where the budget is over layers with all the others.

    Args:
        shared: what it shares with the other layers of its cache.
        layer_idx: its index.
        layer_rank: `(i, n)`, this is folding layer `i` of `n`; `None` where that is not known.

    Attributes:
        fold_is_due: whether it waits for its fold.
        scored: what it has handed up, while it waits for the other layers.
    """

    def __init__(self, shared: Shared, layer_idx: int, layer_rank: tuple[int, int] | None = None) -> None:
        self.layer_rank = layer_rank
        super().__init__(shared, layer_idx)

    def join(self, shared: Shared) -> None:
        super().join(shared)
        self.guards = Guards(self.layer_idx, shared)
        if self.joint is not None:
            self.joint.join(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.joint is not None:  # copies that a model makes of its layers fold with the others
            self.joint.join(self)

    @property
    def joint(self) -> JointFold | None:
        """The layers that it folds together with; `None` where it folds alone."""
        return self._shared.joint

    def _clear(self) -> None:
        super()._clear()
        self.fold_is_due = False
        self.scored: Scored | None = None
        self._asked_again: Tensor | None = None  # [B, seen] bool, the tokens that tell something when read again
        self._sees_no_outputs = False  # though a stage wants to
        self._last_pass: tuple[int, Observed] | None = None  # its length and what was observed before, to undo it
        self._observed = Observed()

    @property
    def scorer(self) -> Scorer | None:
        """What says how important the tokens of this layer are; `None` where all stay."""
        return None if self._shared.config.compression_ratio == 0 else self._shared.fold.scorer

    @property
    def budget(self) -> Budget | None:
        """What says which tokens of this layer survive; `None` where all do."""
        return None if self._shared.config.compression_ratio == 0 else self._shared.fold.budget

    @property
    def merger(self) -> Merger | None:
        """What becomes of the tokens that this layer evicts; `None` where it evicts none."""
        return None if self._shared.config.compression_ratio == 0 else self._shared.fold.merger

    @property
    def fallbacks(self) -> list[str]:
        """What stages had to do without, and why."""
        stages, found = self._shared.fold.stages, []
        if (reason := self._observed.owner.no_rotary) is not None:
            names = " and ".join(name for name, stage in stages.items() if stage.uses_rotary)
            found.append(f"Without the rotary embedding: {names}; {reason}.")
        if self._sees_no_outputs:
            names = " and ".join(name for name, stage in stages.items() if stage.needs_outputs)
            found.append(f"Without the output projection: {names}; the attention has none that fits the values.")
        return found

    @property
    def nbytes(self) -> int:
        """Bytes held, what was observed included."""
        return super().nbytes + self._observed.nbytes

    def check_finite(self) -> None:
        """Refuse to read anything again behind states that cannot be folded."""
        check_finite(self._states(*self.storage.read()))

    def is_to_look_again(self, asked: Tensor) -> None:
        """Before tokens are read again, `[B, seen]` bool: those that are to tell something."""
        self._asked_again = asked.to(self.device)

    @property
    def drawn_again(self) -> dict[str, Statistics]:
        """What the stages that want it remember of tokens that were read again."""
        return {name: one for name, one in self._observed.remembered.items() if name in self._shared.fold.rereading}

    @drawn_again.setter
    def drawn_again(self, drawn: dict[str, Statistics]) -> None:
        self._observed.remembered = {**self._observed.remembered, **drawn}

    def watch_again(
        self,
        key: Tensor,
        given: Tensor,
        columns: Tensor | None,
        keys: Tensor,
        values: Tensor,
        there: Tensor | None,
        hidden_states: Tensor | None,
    ) -> Callable[[Tensor, Tensor, slice], None]:
        """Have the stages that want it look at tokens that are read again.

        Args:
            key: what the attention is given.
            given: `[B, H, n + q, D]`, the keys that it was given for that: of the stored tokens that are seen, and of
                the q tokens that are read again.
            columns: `[n]`, which of the stored tokens are seen; `None` for all.
            keys, values: `[B, H, L, D]`, those stored.
            there: `[B, q]` bool, where a row has such a token; `None` where all do.
            hidden_states: `[B, q, hidden]`, the attention's input, where someone asked for it.

        Returns:
            what is to be called with attention weights `[B, Hq, m, n + q]`, what is read by them `[B, Hq, m, D]`, and
            which m of the q tokens they are of.
        """
        self.guards.check_hidden_states(hidden_states)
        fold, states = self._shared.fold, self._states(keys, values)
        states = states if columns is None else states.at(columns)
        norms = None if hidden_states is None else torch.linalg.vector_norm(hidden_states.float(), dim=-1)

        with self._in_full_precision():
            projected = Projected.of(states) if fold.needs_outputs else None
        self._sees_no_outputs = projected is not None and projected.projection is None

        def watch(weights: Tensor, outputs: Tensor, part: slice) -> None:
            nonlocal states
            by_head = by_stored_head(weights.detach(), key, given)
            self.guards.check_comparable(by_head, key, given)
            by_head = by_head[..., : states.num_tokens].unflatten(1, (keys.shape[1], -1))
            if there is not None:
                by_head = by_head * there[:, None, None, part, None].to(by_head.device)
            again = Again(by_head, None if norms is None else norms[:, part])
            with self._in_full_precision():
                if projected is not None:
                    read = by_stored_head(outputs.detach(), key, given).unflatten(1, (keys.shape[1], -1))
                    lengths = projected.lengths(read, self._shared.link.summed)
                    again = replace(again, outputs=read, lengths=lengths, projected=projected)
                drawn = fold.observe_again(replace(states, again=again))
            states = replace(states, remembered={**states.remembered, **drawn})
            if columns is not None:
                drawn = {name: one.placed(columns, self.num_stored) for name, one in drawn.items()}
            self.drawn_again = drawn

        return watch

    # Folding ----------------------------------------------------------------------------------------------------------

    def fold_if_due(self, *stored: Tensor) -> None:
        """Fold what is stored, if that is due; `stored` are its keys and values where they are at hand.

        Where layers fold together all do that wait for it.
        """
        if not self.fold_is_due:
            return
        if self.joint is not None:
            self.joint.fold()
            return
        with self._prepared(*stored) as states:
            slots = self._shared.fold(states, self._shared.config.num_slots(self.seen))
        self._replace(slots)

    def fold_with_others(self, *stored: Tensor) -> None:
        """The same after a pass, which reaches the other layers later: where layers fold together, with the last."""
        if not self.fold_is_due or self._shared.is_to_be_read_again:
            return
        if self.joint is None:
            self.fold_if_due(*stored)
            return
        self.score(*stored)
        self.joint.fold_if_all_are_scored()

    def score(self, *stored: Tensor) -> None:
        """Score what is stored, for a fold together with the other layers."""
        with self._prepared(*stored) as states:
            scores, num_slots = self._shared.fold.score(states, self._shared.config.num_slots)
        self.scored = Scored(scores, states.positions, num_slots)

    def fold_into(self, kept: Tensor) -> None:
        """Fold into the tokens `[B, H, L]` bool, which were chosen by the scores of all layers."""
        was_offloaded = self._is_offloaded
        if was_offloaded:
            self.prefetch()
        with self._prepared() as states:
            slots = self._shared.fold.keep(states, kept, self.scored.scores)
        self._replace(slots)
        if was_offloaded:
            self.offload()

    @contextmanager
    def _prepared(self, *stored: Tensor) -> Iterator[LayerStates]:
        """What is to be folded, once it was looked at."""
        keys, values = stored or self.storage.read()
        self.guards.check_mergeable(self.shape)
        self.guards.check_owner(self._observed.owner)
        self.guards.check_read_again(self._asked_again is not None)
        self._shared.padding.warn_if_unknown(keys)
        with torch.autocast(self.device.type, enabled=False):  # gradients flow through a fold
            yield self._states(keys, values)

    @contextmanager
    def _in_full_precision(self) -> Iterator[None]:
        """What is observed is reckoned in fp32 and without gradients, whatever the model runs in."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            yield

    def _states(self, keys: Tensor, values: Tensor) -> LayerStates:
        """Everything that is stored and was observed, with positions that do not count padding."""
        positions, valid, observed = self.positions, self.storage.valid, self._observed
        row_positions = self._shared.padding.row_positions
        # padding is evicted from all heads alike, so one head's positions tell
        padding = self._shared.padding.of_tokens(positions[:, 0])
        if valid is not None:
            valid = torch.nn.functional.pad(valid, (0, self.num_tail), value=True)
            if padding is not None:
                padding[:, : self.num_slots] = False  # none is among ragged slots
                padding = padding if padding.any() else None
        return LayerStates(
            keys=keys,
            values=values,
            positions=row_positions(positions),
            log_mass=self.log_mass,
            padding=padding,
            valid=valid,
            queries=observed.queries,
            query_positions=None if observed.queries is None else row_positions(observed.positions),
            hidden_states=observed.hidden_states,
            remembered=self._remembered,
            module=observed.owner.module,
            rotary=observed.owner.rotary,
            scaling=observed.scaling,
            layer_idx=self.layer_idx,
            layer_rank=self.layer_rank,
            lessons=self._shared.lessons(self.layer_rank),
            traced=self._shared.traced,
            known_seen=None if self._shared.padding.is_there else self.seen,
        )

    @property
    def _remembered(self) -> dict[str, Statistics]:
        """What each stage remembers, with room for all that is stored.

        What the scorer keeps per token lies with the slots after a fold, until it observes again.
        """
        remembered, of_slots = self._observed.remembered, self.storage.statistics
        of_scorer = remembered.get("scorer", Statistics())
        if of_slots is not None and of_scorer.tokens is None:
            remembered = remembered | {"scorer": replace(of_scorer, tokens=of_slots)}
        return {name: one.resized(self.num_stored) for name, one in remembered.items()}

    def told(self, stage: str) -> list[LayerStates]:
        """By row, its tokens that were read again, with what a stage that learns was told of them; it is not kept."""
        nothing = Statistics(torch.zeros(self.positions.shape, device=self.device))
        statistics = self._observed.remembered.pop(stage, nothing).resized(self.num_stored)
        states = replace(self._states(*(one.detach() for one in self.storage.read())), statistics=statistics)
        # where a token is read again no head has lost it
        positions, rows = self.positions[:, 0], torch.arange(self.batch, device=self.device)
        asked = self._asked_again.gather(1, positions.clamp_min(0)) & (positions >= 0)
        return [states.select(row, there.nonzero().squeeze(1)) for row, there in zip(rows.split(1), asked, strict=True)]

    def _replace(self, slots: Slots) -> None:
        """Store folded slots in place of everything."""
        slots = replace(slots, positions=self._shared.padding.sequence_positions(slots.positions))
        self.storage = store(slots, self._shared.new_storage)
        self._observed.settle(self._shared.fold, slots)
        self.tally = Tally.after(self.tally, slots)
        self.fold_is_due, self.scored, self._asked_again, self._last_pass = False, None, None, None

    def release(self) -> None:
        """Forget the attention module, so that this cache does not keep the model alive."""
        self._observed.owner = self._observed.owner.forgotten()

    def _select_rows(self, indices: Tensor) -> None:
        super()._select_rows(indices)
        self._observed.select_rows(indices)
