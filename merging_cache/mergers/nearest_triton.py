"""The search for nearest candidates as one Triton kernel for GPUs: products stay on the chip, memory is linear.

Each program takes a block of tokens past all candidates, and keeps the largest product so far and its place in
registers: the matrix of products is never written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS, BLOCK_CANDIDATES = 128, 128
MAX_FEATURES = 256  # wider ones do not fit the chip


@triton.jit
def nearest_kernel(
    tokens,
    candidates,
    candidate_scale,
    bias,
    value,
    index,
    num_tokens,
    num_candidates,
    num_features: tl.constexpr,
    width: tl.constexpr,
    block_tokens: tl.constexpr,
    block_candidates: tl.constexpr,
):
    """What `nearest` returns, for one block of tokens of one head."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    feature = tl.arange(0, width)
    is_feature = feature[None, :] < num_features
    asking = (head * num_tokens + row)[:, None] * num_features + feature[None, :]
    a = tl.load(tokens + asking, mask=(row[:, None] < num_tokens) & is_feature, other=0.0)
    best = tl.full((block_tokens,), -float("inf"), tl.float32)
    place = tl.zeros((block_tokens,), tl.int32)
    for start in range(0, num_candidates, block_candidates):
        column = start + tl.arange(0, block_candidates)
        is_candidate = column < num_candidates
        offered = (head * num_candidates + column)[:, None] * num_features + feature[None, :]
        b = tl.load(candidates + offered, mask=is_candidate[:, None] & is_feature, other=0.0)
        scale = tl.load(candidate_scale + head * num_candidates + column, mask=is_candidate, other=0.0)
        closed = tl.load(bias + head * num_candidates + column, mask=is_candidate, other=-float("inf"))
        products = tl.dot(a, tl.trans(b), input_precision="ieee") * scale[None, :] + closed[None, :]
        largest, where = tl.max(products, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = largest > best  # not where equal: the first one stays
        best = tl.where(better, largest, best)
        place = tl.where(better, start + where, place)
    out = head * num_tokens + row
    tl.store(value + out, best, mask=row < num_tokens)
    tl.store(index + out, place, mask=row < num_tokens)


def nearest(tokens: Tensor, candidates: Tensor, candidate_scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The largest `<a, b> s_b + bias_b` `[N, E]` in fp32 and which candidate has it, the first of equal ones.

    Args:
        tokens: `[N, E, F]`, contiguous, F at most `MAX_FEATURES`.
        candidates: `[N, K, F]`, contiguous, of the same dtype.
        candidate_scale, bias: `[N, K]` in fp32.
    """
    heads, asking, features = tokens.shape
    value = torch.empty((heads, asking), device=tokens.device)
    index = torch.empty((heads, asking), dtype=torch.int32, device=tokens.device)
    wide = features * tokens.element_size() > 256
    block = BLOCK_CANDIDATES // 2 if wide else BLOCK_CANDIDATES
    nearest_kernel[(triton.cdiv(asking, BLOCK_TOKENS), heads)](
        tokens,
        candidates,
        candidate_scale,
        bias,
        value,
        index,
        asking,
        candidates.shape[1],
        num_features=features,
        width=max(16, triton.next_power_of_2(features)),
        block_tokens=BLOCK_TOKENS,
        block_candidates=block,
        num_warps=8,
        num_stages=2 if wide else 3,
    )
    return value, index.long()
