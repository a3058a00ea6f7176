"""Gates: small maps from the attention's input to the logarithm of what each KV head's token will draw."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import moments, ridge_regressions
from ..scorers.kvzap import gate

RIDGES = (1e-3, 1e-2, 1e-1)  # of a linear map of standardized inputs; the best on held-out tokens is taken
BATCH, EPOCHS, RATE = 512, 40, 5e-3


@dataclass(frozen=True)
class Gate:
    """A gate of one layer, and how well it does on held-out tokens.

    Args:
        weights: by the names of KVzap's format (arXiv:2601.07891): `weight` and `bias` of a linear map, or those of
            `0` and `2`, the two of an MLP with a GELU between.
        error: the mean squared error of the logarithms.
        correlation: by head `[H]`, of what is predicted with what was drawn.
    """

    weights: dict[str, Tensor]
    error: float
    correlation: Tensor


@dataclass(frozen=True)
class Lesson:
    """What is known of one layer: inputs `[n, hidden]` and logarithms of scores `[n, H]`, to fit and to judge by."""

    inputs: Tensor
    scores: Tensor
    held_out_inputs: Tensor
    held_out_scores: Tensor

    def judge(self, weights: dict[str, Tensor]) -> Gate:
        """A gate by its weights, which it is rounded to as they are written."""
        weights = {name: one.half().float() for name, one in weights.items()}
        said, true = gate(self.held_out_inputs, weights), self.held_out_scores
        apart = [one - one.mean(dim=0) for one in (said, true)]
        lengths = torch.linalg.vector_norm(apart[0], dim=0) * torch.linalg.vector_norm(apart[1], dim=0)
        correlation = (apart[0] * apart[1]).sum(dim=0) / lengths.clamp_min(1e-12)
        return Gate(weights, float((said - true).square().mean()), correlation)


def fit_linear(lesson: Lesson) -> Gate:
    """The linear map by ridge regression, in closed form."""
    found = ridge_regressions(lesson.inputs, lesson.scores, RIDGES)
    gates = [lesson.judge({"weight": weight.contiguous(), "bias": bias}) for weight, bias in found]
    return min(gates, key=lambda one: one.error)


def fit_mlp(lesson: Lesson, hidden_dim: int, seed: int) -> Gate:
    """The MLP by Adam on the squared error; of all epochs the best on held-out tokens."""
    device, generator = lesson.inputs.device, torch.Generator().manual_seed(seed)
    mean, deviation = (one.squeeze(0) for one in moments(lesson.inputs))
    inputs = (lesson.inputs - mean) / deviation  # zeros where an input is always the same
    middle, spread = lesson.scores.mean(dim=0), lesson.scores.std(dim=0).clamp_min(1e-6)
    scores = (lesson.scores - middle) / spread
    width, heads = inputs.shape[1], scores.shape[1]
    shapes = {"0.weight": (hidden_dim, width), "0.bias": (hidden_dim,), "2.weight": (heads, hidden_dim)}
    weights = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    weights = {
        name: one.to(device).requires_grad_() for name, one in (weights | {"2.bias": torch.zeros(heads)}).items()
    }
    steps = math.ceil(len(inputs) / BATCH)
    optimizer = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps * EPOCHS)
    best: Gate | None = None
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs), generator=generator).split(BATCH):
            loss = (gate(inputs[batch], weights) - scores[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            first = weights["0.weight"] / deviation
            plain = {
                "0.weight": first,
                "0.bias": weights["0.bias"] - first @ mean,
                "2.weight": weights["2.weight"] * spread.unsqueeze(1),
                "2.bias": weights["2.bias"] * spread + middle,
            }
            found = lesson.judge({name: one.detach().clone() for name, one in plain.items()})
        if best is None or found.error < best.error:
            best = found
    return best
