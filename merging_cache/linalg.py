"""Linear systems of symmetric positive definite matrices, for scorers and mergers; knows tensors only."""

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
