"""The records that pass between the stages of a fold: what a layer holds, which tokens survive, what is stored.

Plain tensors and nothing else: scorers, budgets and mergers know these records and torch, never transformers.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerStates:
    """Everything one attention layer knows about its tokens when it folds.

    Scorers and mergers called by a cache never meet padding: rows are handed over without it (see `fold.py`), so
    `padding` is `None` there and a scorer can be written as if every row were alone.

    Args:
        keys: `[B, H, L, D]`, after RoPE, in the model's precision.
        values: `[B, H, L, D]`.
        positions: `[B, H, L]`, the position of each token in the (padded) sequence, ascending. `None` numbers the
            tokens 0 to L - 1.
        log_mass: `[B, H, L]`, added to a slot's attention logits where earlier folds gave it mass, or `None`.
        padding: `[B, L]` bool, True where the token is padding, or `None` where there is none.
        queries: `[B, Hq, n, D]` observed queries after RoPE, or `None`.
        query_positions: `[n]`, their positions.
        hidden_states: `[B, n, hidden]`, or `None`.
        module: the attention module, where the cache is bound to a model.
        scaling: the factor on the attention logits.
        layer_idx: the layer's index in the model.

    Raises:
        ValueError: if keys, values, positions or padding do not fit together.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    log_mass: Tensor | None = None
    padding: Tensor | None = None
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    hidden_states: Tensor | None = None
    module: torch.nn.Module | None = None
    scaling: float | None = None
    layer_idx: int | None = None

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

    @property
    def num_tokens(self) -> int:
        """L, the number of stored tokens of every row and head."""
        return self.keys.shape[2]

    def select(self, rows: Tensor, tokens: Tensor) -> "LayerStates":
        """The states of these `rows` (indices) and `tokens` (indices, ascending), without padding."""

        def take(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows].index_select(2, tokens)

        return replace(
            self,
            keys=take(self.keys),
            values=take(self.values),
            positions=take(self.positions),
            log_mass=take(self.log_mass),
            padding=None,
            queries=None if self.queries is None else self.queries[rows],
            hidden_states=None if self.hidden_states is None else self.hidden_states[rows],
        )


@dataclass(frozen=True)
class Survivors:
    """Which tokens keep their slot: a budget's answer.

    Args:
        indices: `[B, H, K]`, ascending indices into the L stored tokens.
        valid: `[B, H, K]` bool, False where a head has fewer than K slots; `None` where every slot is real.
        protected: `[B, H, K]` bool, True for sinks and recent tokens, into which nothing is merged; `None` for none.
    """

    indices: Tensor
    valid: Tensor | None = None
    protected: Tensor | None = None

    def evicted(self, num_tokens: int) -> Tensor:
        """`[B, H, L - K]`, the ascending indices of the tokens that lose their slot."""
        batch, heads, kept = self.indices.shape
        lost = torch.ones(batch, heads, num_tokens, dtype=torch.bool, device=self.indices.device)
        lost.scatter_(2, self.indices, False)
        return lost.nonzero()[:, 2].view(batch, heads, num_tokens - kept)


@dataclass(frozen=True)
class Slots:
    """What a layer stores after a fold.

    Args:
        keys, values: `[B, H, K, D]`, in the model's precision, owning their memory.
        positions: `[B, H, K]`, the position of each slot's survivor.
        num_merged: `[B, H]`, evicted tokens folded into a survivor in this fold.
        num_dropped: `[B, H]`, evicted tokens that were not.
        log_mass: `[B, H, K]`, or `None` where no slot has mass beyond its own token.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    num_merged: Tensor
    num_dropped: Tensor
    log_mass: Tensor | None = None

    @classmethod
    def of_survivors(cls, states: LayerStates, survivors: Survivors) -> "Slots":
        """The survivors as they are, everything else counted as dropped: hard eviction."""
        indices = survivors.indices
        counts = torch.zeros(indices.shape[:2], dtype=torch.long, device=indices.device)
        return cls(
            keys=gather_tokens(states.keys, indices),
            values=gather_tokens(states.values, indices),
            positions=states.positions.gather(2, indices),
            log_mass=None if states.log_mass is None else states.log_mass.gather(2, indices),
            num_merged=counts,
            num_dropped=counts + (states.num_tokens - indices.shape[2]),
        )

    def write_into(self, other: "Slots", rows: Tensor, columns: Tensor) -> None:
        """Write these slots over `columns` (indices) of `rows` (indices) of another, larger record."""
        for field in fields(self):
            mine, whole = getattr(self, field.name), getattr(other, field.name)
            if mine is None:
                continue
            if whole.dim() == 2:
                whole[rows] = mine
            else:
                block = whole[rows]
                block[:, :, columns] = mine
                whole[rows] = block


def gather_tokens(states: Tensor, indices: Tensor) -> Tensor:
    """`[B, H, L, D]` and indices `[B, H, K]` to `[B, H, K, D]`, a new tensor."""
    return states.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))
