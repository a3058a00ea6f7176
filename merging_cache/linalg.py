"""Linear systems of symmetric positive definite matrices, and maps that are fitted by them; knows tensors only."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def solve_positive_definite(matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix^-1 right` for symmetric positive definite `[..., n, n]` and `[..., n, m]`.

    By Cholesky's factors: LU of a batch of such matrices never returns on some processors (torch 2.13 with MKL, two
    threads and more, n of 200 and more). Where rounding left a matrix without a factor, `n (n + 1) eps` of its largest
    diagonal element is added to its diagonal, with which there is one (Higham, Accuracy and Stability of Numerical
    Algorithms, theorem 10.7). No number is asked of another device than the CPU.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if matrix.device.type == "cpu" and not failed.any():
        return torch.cholesky_solve(right, factor)
    n, diagonal = matrix.shape[-1], matrix.diagonal(dim1=-2, dim2=-1)
    lift = n * (n + 1) * torch.finfo(matrix.dtype).eps * diagonal.amax(dim=-1, keepdim=True)
    lifted_factor, _ = torch.linalg.cholesky_ex(matrix + torch.diag_embed(lift.expand_as(diagonal)))
    return torch.cholesky_solve(right, torch.where((failed == 0)[..., None, None], factor, lifted_factor))


def ridge_regressions(inputs: Tensor, wanted: Tensor, ridges: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Linear maps `[..., m, D]` and constants `[..., m]` from inputs `[..., n, D]` to `[..., n, m]`, by least squares.

    In fp64. Inputs are standardized; for each of the ridges, which is added to their variance, there is one map.
    """
    inputs, wanted = inputs.double(), wanted.double()
    (middle, deviation), level = moments(inputs), wanted.mean(dim=-2, keepdim=True)
    standard = (inputs - middle) / deviation
    gram, product = standard.mT @ standard, standard.mT @ (wanted - level)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for ridge in ridges:
        weights = solve_positive_definite(gram + ridge * inputs.shape[-2] * identity, product).mT / deviation
        yield weights, (level - middle @ weights.mT).squeeze(-2)


def lengths_of(vectors: Tensor) -> Tensor:
    """`[..., D]` to `[...]` in fp32, reckoned in that at least without a copy of the vectors."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return torch.linalg.vector_norm(vectors, dim=-1, dtype=dtype).float()


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `[..., 1, D]` of `[..., n, D]`.

    The deviation is infinite where it is next to nothing beside the others': so nothing goes by what hardly varies.
    """
    middle = values.mean(dim=-2, keepdim=True)
    deviation = (values - middle).square().mean(dim=-2, keepdim=True).sqrt()
    return middle, deviation.masked_fill(deviation <= 1e-4 * deviation.amax(dim=-1, keepdim=True), torch.inf)
