"""What a layer's output projection makes of its values, and how its output changes where a token is left out."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..twin import matrix_of
from .attention import group_logits
from .layer import TILE, Again, LayerStates

PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj_out", "proj")
LEAST_LEFT = 0.01  # what is left to the others where a token draws all of the attention


def output_projection(states: LayerStates) -> Tensor | None:
    """`[H, G, D, hidden]` in fp32, the parts of the output projection that belong to these KV heads.

    `None` where the attention module has none that fits.
    """
    dim = states.values.shape[3]
    num_heads = states.keys.shape[1] if states.num_heads is None else states.num_heads
    groups = getattr(states.module, "num_key_value_groups", None)
    for name in PROJECTIONS:
        layer = getattr(states.module, name, None)
        weight = None if layer is None else matrix_of(layer, states.values)
        if weight is None or weight.shape[0] % (num_heads * dim):
            continue
        if groups not in (None, weight.shape[0] // (num_heads * dim)):
            continue
        parts = weight.to(states.values.device).unflatten(0, (num_heads, -1, dim))
        return parts if states.heads is None else parts[states.heads.to(parts.device)]
    return None


@dataclass(frozen=True)
class Projected:
    """The values of a layer, and the projection that they are seen through; `None` where heads are seen as they are.

    Args:
        values: `[B, H, L, D]` in fp32.
        projection: `[H, G, D, hidden]`, see `output_projection`.
        metric: `[H, G, D, D]`, its products with itself.
        squares: `[B, H, G or 1, L]`, the squared lengths of the values after it.
    """

    values: Tensor
    projection: Tensor | None
    metric: Tensor | None
    squares: Tensor

    @classmethod
    def of(cls, states: LayerStates) -> "Projected":
        """Those of a layer."""
        values, projection = states.values.float(), output_projection(states)
        if projection is None:
            return cls(values, None, None, values.square().sum(dim=-1).unsqueeze(2))
        metric = projection @ projection.mT
        (batch, heads, length, dim), group = values.shape, metric.shape[1]
        squares = values.new_empty((batch, heads, group, length))
        step = max(1, TILE // (batch * heads * dim))
        for number in range(group):
            for start in range(0, length, step):
                part = values[:, :, start : start + step]
                squares[:, :, number, start : start + step] = ((part @ metric[:, number]) * part).sum(dim=-1)
        return cls(values, projection, metric, squares)

    def lengths(self, outputs: Tensor, summed: Callable[[Tensor], Tensor]) -> Tensor:
        """`[B, m]`, the lengths of what all heads together give out of `outputs` `[B, H, G, m, D]`.

        `summed` adds up what processes hold that share the heads of the layer.
        """
        if self.projection is None:
            return summed(outputs.float().square().sum(dim=(1, 2, 4))).sqrt()
        return torch.linalg.vector_norm(
            summed(torch.einsum("bhgmd,hgdn->bmn", outputs.float(), self.projection)), dim=-1
        )

    def changes(self, again: Again) -> Tensor:
        """`[B, H, L]`, see `changes_left_out`."""
        outputs = again.outputs.float()
        seen = outputs if self.metric is None else outputs @ self.metric
        # |W v|^2 - 2 (W v)(W o) + |W o|^2, in one piece of memory
        apart = group_logits(seen, self.values).mul_(-2).add_(self.squares.unsqueeze(3))
        apart = apart.add_((seen * outputs).sum(dim=-1, keepdim=True)).clamp_min_(0).sqrt_()
        weights = again.weights.float()
        changes = apart.mul_(weights).div_((1 - weights).clamp_min_(LEAST_LEFT)).sum(dim=2)  # [B, H, m, L]
        changes = changes.div_(again.lengths[:, None, :, None].clamp_min(torch.finfo(torch.float32).tiny))
        return changes.square_().sum(dim=2)


def changes_left_out(states: LayerStates) -> Tensor:
    """`[B, H, L]`, how the output of the layer changes if a token is left out, for all that is read again together.

    `sum_q (sum_g p / (1 - p) |W_g (v - o_g)| / |y|)^2`, where query head g of the group gives the token the weight p,
    reads o_g by all of its weights, and the layer adds y; what was remembered is added. A head that loses a token
    shares its weight out among the others, and o_g moves by `p / (1 - p) (v - o_g)`; 1 - p is taken for 0.01 at least.
    """
    found = states.again.changes
    return found if states.statistics is None else found + states.statistics.tokens
