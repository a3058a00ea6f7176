"""Scores of answers, as RULER defines them, and bootstrap intervals of what differs between caches."""

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

RESAMPLED = 5000


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that the prediction contains, in [0, 1], whatever their case (RULER, arXiv:2404.06654).

    Example:
        >>> string_match_all("They are FOX and owl.", ["fox", "owl", "elk", "cat"])
        0.5
    """
    given = cleaned(prediction)
    return sum(answer.lower() in given for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction contains any of the answers, else 0, whatever their case: RULER's measure for questions.

    Example:
        >>> string_match_part("In the year 1492", ["1492", "in 1492"])
        1.0
    """
    given = cleaned(prediction)
    return float(any(answer.lower() in given for answer in answers))


METRICS = {"all": string_match_all, "part": string_match_part}


def cleaned(prediction: str) -> str:
    """In lower case, with control characters as line breaks, as RULER compares."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction).strip().lower()


@cache
def _weights(count: int, stratum: int = 0) -> Tensor:
    """`[RESAMPLED, count]`, each row the weights of as many examples, drawn with replacement, in their mean."""
    drawn = torch.randint(count, (RESAMPLED, count), generator=torch.Generator().manual_seed(stratum))
    weights = torch.zeros(drawn.shape, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / count, dtype=weights.dtype))


def bootstrap_interval(differences: Tensor) -> tuple[Tensor, Tensor]:
    """The 95% interval of the mean over the last dimension, by the percentiles of resampled means.

    Args:
        differences: `[..., n]`, one for each example: taken example by example, the interval is a paired one.

    Returns:
        its lower and its upper end, `[...]` each, always the same ones for the same differences.
    """
    differences = differences.double()
    return _percentiles(differences @ _weights(differences.shape[-1]).mT)


def bootstrap_interval_of_tasks(differences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same for the mean over tasks of the means of their examples, `[n]` each; each task is resampled by itself."""
    means = [one.double() @ _weights(len(one), task).mT for task, one in enumerate(differences)]
    return _percentiles(torch.stack(means).mean(dim=0))


def _percentiles(means: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype), dim=-1)
    return low, high
