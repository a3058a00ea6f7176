"""The budget that measured best with what the cache was given."""

from dataclasses import dataclass

from torch import Tensor

from ..states import LayerStates, Survivors
from .adakv import AdaKVBudget
from .base import Budget
from .uniform import UniformBudget


@dataclass
class AutoBudget(Budget):
    """The scorer's own where the cache has the model, `uniform` where it has the config only.

    A scorer's own (`Scorer.default_budget`) is `pyramid` for `pyramidkv`, `global` for `kvzip` and `leave_one_out`, and
    `profile` for `probe`, the default, `keydiff` and `cap`, chosen by what was measured on real weights
    (`examples/README.md`); where a model cannot read a prompt again, `adakv`. Others have `uniform`. `cache.report()`
    says which of them runs.
    """

    def resolve(self, linked: bool, rereadable: bool, own: str) -> Budget:
        from . import BUDGETS

        budget = BUDGETS[own]() if linked else UniformBudget()
        return budget if rereadable or not budget.reads_again else AdaKVBudget()

    def allocate(self, scores: Tensor, states: LayerStates, num_slots: int) -> Survivors:
        return UniformBudget().allocate(scores, states, num_slots)
