"""Linear systems against NumPy's, and that they come back: some LU of batches never does."""

import subprocess
import sys

import numpy
import pytest
import torch

from merging_cache.linalg import solve_positive_definite

pytestmark = pytest.mark.core


def positive_definite(batch, n, rank, ridge, dtype=torch.float32):
    """`[batch, n, n]`, of this rank but for the ridge."""
    part = torch.randn(batch, n, rank, dtype=dtype)
    return part @ part.mT + ridge * torch.eye(n, dtype=dtype)


@pytest.mark.parametrize("n", [1, 5, 48, 256])
@pytest.mark.parametrize("rank", [1, 40])
def test_systems_are_solved(n, rank):
    matrix, right = positive_definite(3, n, rank, ridge=0.5), torch.randn(3, n, 7)
    expected = numpy.linalg.solve(matrix.double().numpy(), right.double().numpy())
    solved = solve_positive_definite(matrix, right)
    torch.testing.assert_close(solved.double(), torch.from_numpy(expected), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("n", [16, 64, 512])
@pytest.mark.parametrize("spread", [0, 3, 6])
def test_no_matrix_of_low_rank_is_left_without_a_factor(n, spread):
    for rank in (1, 2, 3, 8):
        part = torch.randn(2, n, rank) * torch.logspace(0, spread, rank)
        matrix, right = part @ part.mT, torch.randn(2, n, 3)
        assert solve_positive_definite(matrix, right).isfinite().all()
        # what is returned solves a system whose diagonal is at most so much larger
        lift = 2 * n * (n + 1) * torch.finfo(torch.float32).eps * matrix.diagonal(dim1=1, dim2=2).amax(dim=1)
        solved = solve_positive_definite(matrix, matrix @ right)
        assert ((matrix @ solved - matrix @ right).norm(dim=(1, 2)) <= 1.1 * lift * right.norm(dim=(1, 2))).all()


def test_a_matrix_without_a_factor_in_fp32_is_lifted_alone():
    well, ill = positive_definite(1, 64, 64, ridge=1.0), positive_definite(1, 64, 3, ridge=0.0) * 1e6
    _, failed = torch.linalg.cholesky_ex(torch.cat([well, ill]))
    assert failed.tolist()[0] == 0
    assert failed.tolist()[1] > 0
    right = ill @ torch.randn(1, 64, 2) / 1e6
    solved = solve_positive_definite(torch.cat([well, ill]), torch.cat([right, right]))
    assert solved.isfinite().all()
    assert torch.equal(solved[:1], solve_positive_definite(well, right))
    # among many solutions of the ill one any that solves it will do
    torch.testing.assert_close(ill @ solved[1:], right, rtol=1e-2, atol=1e-2 * right.abs().max().item())


REFIT = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from merging_cache import MergingDynamicCache
from merging_cache.linalg import solve_positive_definite
from merging_cache.model import cache_argument

torch.set_num_threads(2)
part = torch.randn(2, 256, 64)
print(solve_positive_definite(part @ part.mT + torch.eye(256), torch.randn(2, 256, 64)).isfinite().all().item())
config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8,
                     num_key_value_heads=2, head_dim=16)
model = LlamaForCausalLM(config).eval()
for how in ({"merger": "refit"}, {"scorer": "leverage"}, {"scorer": "cap"}):
    cache = MergingDynamicCache(model=model, **how)
    model(torch.arange(100)[None].repeat(2, 1) % 97, **cache_argument(cache))
    print(cache.layers[0].values.isfinite().all().item())
"""


@pytest.mark.slow
def test_batches_of_large_systems_come_back_on_two_threads():
    """In a process of its own, which is killed if they do not: batches of grams of 512 rows and of 256."""
    done = subprocess.run([sys.executable, "-c", REFIT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 4
