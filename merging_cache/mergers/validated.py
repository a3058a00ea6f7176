"""For every head the merger that does best on queries that none of them has seen."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from ..stage import Spec, option
from ..states import LayerStates, Slots, Survivors
from .base import Merger
from .drop import DropMerger
from .reference import ReferenceMerger, full_output, output_error


@dataclass
class ValidatedMerger(ReferenceMerger):
    """Several mergers, judged for every KV head by the error of its output on held-out reference queries.

    The mergers are given the other reference queries. A head takes the one with the smallest error, if that is smaller
    than dropping's by `margin`, and drops otherwise: on the held-out queries it is never worse than `drop`.

    Args:
        queries: see `ReferenceMerger`.
        mergers: the mergers: names, dicts or `Merger` objects.
        held_out: the share of the reference queries that judges.
        margin: by how much of dropping's error a merger has to be better.

    Raises:
        ValueError: if an option is out of its range, or there are no mergers.
    """

    mergers: Sequence[Spec | Merger] = ("count", "mass", "refit")
    held_out: float = option(0.25, minimum=0.05, maximum=0.5)
    margin: float = option(0.05, minimum=0, maximum=1)
    candidates: list[Merger] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.mergers, str) or not isinstance(self.mergers, Sequence) or not self.mergers:
            raise ValueError(f"mergers is {self.mergers!r}; give a list of mergers, one at least")
        self.candidates = [self._wrap(spec) for spec in self.mergers]

    @property
    def wrapped(self) -> Sequence[Merger]:
        return self.candidates

    @property
    def has_mass(self) -> bool:
        return any(merger.has_mass for merger in self.candidates)

    def merge_heads(self, states: LayerStates, survivors: Survivors) -> Slots:
        asked = torch.arange(states.reference.queries.shape[2], device=states.keys.device)
        before = (asked * self.held_out - 1e-6).ceil()  # how many of the queries before each one judge
        judges = ((asked + 1) * self.held_out - 1e-6).ceil() > before  # spread over all of them, the first among them
        held_out = replace(states, reference=states.reference.pick(asked[judges]))
        dropped = DropMerger().merge(states, survivors)
        if judges.all():  # one query cannot both fit and judge
            return dropped
        fitted = replace(states, reference=states.reference.pick(asked[~judges]))
        results = [dropped, *(merger.merge(fitted, survivors) for merger in self.candidates)]
        wanted = full_output(held_out)
        errors = torch.stack([output_error(slots, held_out, wanted) for slots in results])  # [1 + mergers, B, H]
        best = errors[1:].min(dim=0)
        known = states.reference.positions >= 0  # rows may have fewer queries than others
        can_judge = known[:, judges].any(dim=1) & known[:, ~judges].any(dim=1)
        wins = (best.values < (1 - self.margin) * errors[0]) & can_judge.unsqueeze(1)
        chosen = torch.where(wins, best.indices + 1, 0)
        return _pick(results, chosen, survivors)


def _pick(results: list[Slots], chosen: torch.Tensor, survivors: Survivors) -> Slots:
    """The slots of the merger that each row and head `[B, H]` has chosen."""
    picked = {}
    for one in fields(Slots):
        tensors = [getattr(slots, one.name) for slots in results]
        like = next((tensor for tensor in tensors if tensor is not None), None)
        if like is None:
            continue
        default = survivors.indices if one.name == "tokens" else torch.zeros_like(like)
        stacked = torch.stack([default if tensor is None else tensor for tensor in tensors])
        index = chosen.view(1, *chosen.shape, *[1] * (stacked.dim() - 3)).expand(1, *stacked.shape[1:])
        picked[one.name] = stacked.gather(0, index).squeeze(0)
    return Slots(**picked)
