"""The nearest candidate of every token: exact, in memory that grows with the number of tokens and not with its square.

Three engines give the same answer, to within rounding in fp32, and each the same bits every time. `tiled` multiplies a
tile of tokens with all candidates in fp32, anywhere. `screened` does so in 8 or 16 bits on CPUs that are faster there,
and looks again in fp32 at those few candidates that rounding could have confused. `nearest_triton.py` keeps products on
the chip of a GPU.
"""

from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..states import TILE, gather_tokens

CHUNK = 32  # candidates of which the largest product is found first
BLOCK = 64  # tokens that look for near candidates at a time
PANEL = 1 << 14  # candidates that are multiplied at a time in few bits
FEW = 16  # candidates per token that rounding may have confused; where there are more, more bits are worth it
SMALL = 1 << 18  # products of one head below which they are all computed in fp32


@dataclass(frozen=True)
class Search:
    """For each of some tokens the candidate with the largest `<s_i f_i, s_j f_j> + b_j`; of equal ones, the first.

    Args:
        features: `[N, L, F]`, f, of every token of N heads.
        scale: `[N, L]`, s, or `None` for 1.
        tokens: `[N, E]`, indices of the tokens that ask.
        candidates: `[N, K]`, indices of those they choose from; descending where there is a window.
        bias: `[N, K]` in fp32, b; `-inf` for a candidate that must not be chosen.
        unbiased: whether b is 0 or `-inf` everywhere.
        positions, window: `[N, L]`, ascending, and how many positions away a candidate may be; `None` for any number.
    """

    features: Tensor
    scale: Tensor | None
    tokens: Tensor
    candidates: Tensor
    bias: Tensor
    unbiased: bool = True
    positions: Tensor | None = None
    window: int | None = None

    def run(self) -> tuple[Tensor, Tensor]:
        """The largest value `[N, E]` (`-inf` if there is no candidate) and which of the candidates has it."""
        if self.window is not None:
            return local(self) if self._products_per_head > self.span * self.features.shape[1] else tiled(self)
        if self.features.is_cuda and (kernel := triton_kernel()) and self.features.shape[2] <= kernel.MAX_FEATURES:
            return fused(self, kernel)
        enough = self._products_per_head >= SMALL and self.features.shape[2] > 1  # torch errs in 8 bits where it is 1
        if self.unbiased and enough and precisions(self.features.device.type):
            return screened(self)
        return tiled(self)

    @property
    def _products_per_head(self) -> int:
        return self.tokens.shape[1] * self.candidates.shape[1]

    @property
    def reach(self) -> int:
        """How many blocks on either side a window reaches into."""
        return -(-self.window // BLOCK)

    @property
    def span(self) -> int:
        """How many tokens `local` compares a block with."""
        return (2 * self.reach + 1) * BLOCK

    def head(self, index: int) -> "Search":
        """That of one head."""
        tensors = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **{name: part[index : index + 1] for name, part in tensors.items()})

    def among(self, some: slice) -> "Search":
        """That among some of the candidates."""
        return replace(self, candidates=self.candidates[:, some], bias=self.bias[:, some])

    def vectors(self, heads: slice, indices: Tensor) -> Tensor:
        """`[n, I, F]` in fp32, the scaled features of the tokens of these indices `[n, I]` of some heads."""
        taken = gather_tokens(self.features[heads], indices).float()
        return taken if self.scale is None else taken.mul_(self.scale[heads].gather(1, indices).unsqueeze(-1))


def tiled(search: Search) -> tuple[Tensor, Tensor]:
    """All products in fp32, some heads and a tile of tokens at a time."""
    value, index = _results(search)
    (heads, asking), room = search.tokens.shape, -search.candidates.shape[1] % CHUNK
    count = search.candidates.shape[1] + room  # in full chunks equal candidates have equal products, to the bit
    at_once = max(1, TILE // (256 * count))
    for first in range(0, heads, at_once):
        here = slice(first, min(first + at_once, heads))
        candidates = pad(search.vectors(here, search.candidates[here]), (0, 0, 0, room))
        bias = pad(search.bias[here], (0, room), value=-torch.inf).unsqueeze(1)
        if search.window is not None:
            positions = search.positions[here].int()
            there = pad(positions.gather(1, search.candidates[here]), (0, room))
        step = max(1, TILE // (len(candidates) * count))
        for start in range(0, asking, step):
            tile = search.vectors(here, search.tokens[here, start : start + step])
            products = torch.baddbmm(bias, tile, candidates.mT)
            if search.window is not None:
                own = positions.gather(1, search.tokens[here, start : start + step])
                _close_beyond(products, own, there, search.window)
            value[here, start : start + step], index[here, start : start + step] = _first_largest(products)
    return value, index


@cache
def triton_kernel() -> ModuleType | None:
    """The room of the Triton kernel, or `None` where Triton is not installed."""
    try:
        from . import nearest_triton
    except ImportError:
        return None
    return nearest_triton


def fused(search: Search, kernel: ModuleType) -> tuple[Tensor, Tensor]:
    """All products by one kernel, in the precision that the features come in and summed in fp32."""
    tokens, candidates = (gather_tokens(search.features, part) for part in (search.tokens, search.candidates))
    if search.scale is None:
        return kernel.nearest(tokens, candidates, torch.ones_like(search.bias), search.bias)
    value, index = kernel.nearest(tokens, candidates, search.scale.gather(1, search.candidates), search.bias)
    return value * search.scale.gather(1, search.tokens), index


def _first_largest(products: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the last dimension, in full chunks, and where it is first; `max` alone, with places, is slower."""
    chunks = products.unflatten(-1, (-1, CHUNK))
    best = chunks.amax(dim=-1).max(dim=-1)
    place = best.indices[..., None, None].expand(*best.indices.shape, 1, CHUNK)
    inside = chunks.gather(-2, place).squeeze(-2).max(dim=-1).indices
    return best.values, best.indices * CHUNK + inside


def _close_beyond(products: Tensor, positions: Tensor, others: Tensor, window: int) -> None:
    """Make products `[n, T, C]` of tokens that are further apart than `window` positions `-inf`."""
    products.masked_fill_((positions.unsqueeze(2) - others.unsqueeze(1)).abs_() > window, -torch.inf)


# Among candidates that are near ---------------------------------------------------------------------------------------


def local(search: Search) -> tuple[Tensor, Tensor]:
    """Blocks of tokens with their own and the neighbouring blocks, in time that grows with L alone.

    Positions ascend, so that no token within the window is further away than as many tokens. Evicted or not, all tokens
    of a block are multiplied with all others: gathering those that matter would cost more.
    """
    heads, length = search.features.shape[:2]
    reach, span = search.reach, search.span
    blocks = -(-length // BLOCK)
    around = (reach * BLOCK, (blocks + reach) * BLOCK - length)
    # of equal candidates the first wins, and candidates come from the last to the first, so tokens do here
    later_first = torch.arange(length - 1, -1, -1, device=search.bias.device).unsqueeze(0)
    bias = torch.full((heads, length), -torch.inf, device=search.bias.device)
    bias = bias.scatter_(1, search.candidates, search.bias).flip(1)
    positions = search.positions.int().flip(1)
    value, best = torch.empty_like(bias), torch.empty_like(search.positions)
    at_once = max(1, TILE // (BLOCK * span))
    for head in range(heads):
        here = slice(head, head + 1)
        vectors = pad(search.vectors(here, later_first)[0], (0, 0, *around))
        where, may = pad(positions[head], around), pad(bias[head], around, value=-torch.inf)
        for first in range(0, blocks, at_once):
            last = min(first + at_once, blocks)
            own = slice((first + reach) * BLOCK, (last + reach) * BLOCK)
            near, there, closed = (
                part[first * BLOCK : (last + 2 * reach) * BLOCK].unfold(0, span, BLOCK)
                for part in (vectors, where, may)
            )
            products = torch.baddbmm(closed.unsqueeze(1), vectors[own].view(last - first, BLOCK, -1), near)
            _close_beyond(products, where[own].view(-1, BLOCK), there, search.window)
            largest, place = (part.flatten() for part in _first_largest(products))
            place += torch.arange(first - reach, last - reach, device=place.device).repeat_interleave(BLOCK) * BLOCK
            mine = slice(first * BLOCK, min(last * BLOCK, length))
            value[head, mine], best[head, mine] = largest[: length - mine.start], place[: length - mine.start]
    number = torch.arange(search.candidates.shape[1], device=best.device).expand_as(search.candidates)
    number = torch.zeros_like(best).scatter_(1, search.candidates, number)
    asked = length - 1 - search.tokens
    value = value.gather(1, asked)
    token = (length - 1 - best.gather(1, asked)).clamp(0, length - 1)  # beyond the ends where there is no candidate
    return value, number.gather(1, token)


# In fewer bits, and exact all the same --------------------------------------------------------------------------------


class Int8:
    """Whole numbers from -127 to 127, whose products are exact."""

    dtype, product_dtype = torch.int8, torch.int32
    closed, least = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).min + 1  # marks, and what others are above

    @staticmethod
    def round(vectors: Tensor, each: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`[I, F]` rounded, the scale (one for `each` or one for all), and the length `[I]` of what was lost."""
        largest = vectors.abs().amax(dim=-1, keepdim=True) if each else torch.stack(vectors.aminmax()).abs().amax()
        scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (vectors / scale).round_()
        few = rounded.to(torch.int8)
        return few, scale, torch.linalg.vector_norm(rounded.mul_(-scale).add_(vectors), dim=-1)

    @staticmethod
    def multiply(tokens: Tensor, candidates: Tensor, out: Tensor) -> Tensor:
        return torch._int_mm(tokens, candidates, out=out)

    @staticmethod
    def round_down(products: Tensor) -> Tensor:
        return products.sub_(2).int()  # rounds towards 0, by less than 1


class BFloat16:
    """16-bit floats, whose products are rounded to 16 bits again."""

    dtype, product_dtype = torch.bfloat16, torch.bfloat16
    closed, least = -torch.inf, torch.finfo(torch.bfloat16).min

    @staticmethod
    def round(vectors: Tensor, each: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`[I, F]` rounded, 1, and the length `[I]` of what was lost."""
        few = vectors.bfloat16()
        scale = vectors.new_ones((len(vectors), 1) if each else ())
        return few, scale, torch.linalg.vector_norm(vectors - few.float(), dim=-1)

    @staticmethod
    def multiply(tokens: Tensor, candidates: Tensor, out: Tensor) -> Tensor:
        return torch.mm(tokens, candidates, out=out)

    @staticmethod
    def round_down(products: Tensor) -> Tensor:
        return (products - 2**-7 * products.abs()).bfloat16()  # a product and this, each rounded by 2**-9 at most


@cache
def precisions(device: str) -> tuple[type[Int8] | type[BFloat16], ...]:
    """Those in which this machine multiplies matrices faster than in fp32, the fastest first."""
    if device != "cpu":
        return ()

    def has(*instructions: str) -> bool:
        return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in instructions)

    int8 = (Int8,) if has("vnni", "amx_tile") and hasattr(torch, "_int_mm") else ()
    return (*int8, BFloat16) if has("avx512_bf16", "amx_tile") else int8


def screened(search: Search) -> tuple[Tensor, Tensor]:
    """Products in few bits; those of candidates that could be the best one again, in fp32."""
    value, index = _results(search)
    for head in range(len(value)):
        alone = search.head(head)
        for precision in precisions(search.features.device.type):
            found = screened_panels(alone, precision)
            if found is not None:
                break
        value[head], index[head] = tiled(alone) if found is None else found
    return value, index


def screened_panels(search: Search, precision: type[Int8] | type[BFloat16]) -> tuple[Tensor, Tensor] | None:
    """What `screen` finds among `PANEL` candidates at a time, and the best of that: more do not fit the cache."""
    value, index = _results(search)
    for start in range(0, search.candidates.shape[1], PANEL):
        found = screen(search.among(slice(start, start + PANEL)), precision)
        if found is None:
            return None
        better = found[0] > value  # not where equal: the first one stays
        value, index = torch.where(better, found[0], value), torch.where(better, found[1] + start, index)
    return value, index


def screen(search: Search, precision: type[Int8] | type[BFloat16]) -> tuple[Tensor, Tensor] | None:
    """What `screened` finds for a search of one head in this precision, or `None` where it is too coarse.

    Their mean is taken from all candidates, which moves all products of a token alike: what is left is shorter, and so
    are the errors. With a = a' + da and b = b' + db, where a' and b' are rounded, a product is wrong by
    `|<a, b> - <a', b'>| <= |da| |b| + |a'| |db|`. The best one in few bits is computed in fp32; another can be better
    only if it is at most that error below.
    """
    every = slice(0, 1)
    places = (~search.bias[0].isneginf()).nonzero()[:, 0]
    if not len(places):
        return _results(search)
    indices = (search.candidates[:, places], search.tokens)
    candidates, tokens = (search.vectors(every, part)[0] for part in indices)
    asking, count, device = len(tokens), len(candidates), tokens.device
    mean = candidates.mean(dim=0)
    centred = pad(candidates - mean, (0, 0, 0, -count % CHUNK))  # so that chunks are full
    rounded, scale, lost = precision.round(centred, each=False)
    rounded_tokens, token_scales, lost_of_tokens = precision.round(tokens, each=True)
    longest, length = torch.linalg.vector_norm(centred, dim=-1).amax(), torch.linalg.vector_norm(tokens, dim=-1)
    of_sums = len(mean) * torch.finfo(torch.float32).eps * length * (longest + torch.linalg.vector_norm(mean))
    error = lost_of_tokens * longest + (length + lost_of_tokens) * lost.amax() + of_sums
    unit = (token_scales.flatten() * scale).clamp_min(torch.finfo(torch.float32).tiny)  # of products of rounded vectors
    allowance = (tokens @ mean + error) / unit

    step = max(1, TILE // 2 // len(centred))
    products = torch.empty((min(step, asking), len(centred)), dtype=precision.product_dtype, device=device)
    found, others = [], []  # pairs of a token and a candidate, with their product in fp32, and still without
    for start in range(0, asking, step):
        here = slice(start, min(start + step, asking))
        number = torch.arange(here.stop - start, device=device)
        tile = precision.multiply(rounded_tokens[here], rounded.T, out=products[: len(number)])
        tile[:, count:] = precision.closed
        chunks = tile.view(-1, CHUNK)
        largest = chunks.amax(dim=1).view(len(number), -1)
        per_token = largest.shape[1]
        chunk = largest.argmax(dim=1)
        best = chunk * CHUNK + chunks.index_select(0, number * per_token + chunk).argmax(dim=1)
        exact = candidates.index_select(0, best).mul_(tokens[here]).sum(dim=-1)
        found.append((number + start, best, exact))
        tile[number, best] = precision.closed
        threshold = precision.round_down((exact / unit[here]).sub_(allowance[here])).clamp_min_(precision.least)
        token, chunk = (largest >= threshold.unsqueeze(1)).nonzero(as_tuple=True)
        if len(token) > FEW * len(number):
            return None
        among = chunks.index_select(0, token * per_token + chunk)
        which, inside = (among >= threshold[token].unsqueeze(1)).nonzero(as_tuple=True)
        if len(which) > FEW * len(number):
            return None
        others.append((token[which] + start, chunk[which] * CHUNK + inside))
    token, candidate = map(torch.cat, zip(*others, strict=True))
    at_once = TILE // 8 // tokens.shape[1]
    for one, other in zip(token.split(at_once), candidate.split(at_once), strict=True):
        exact = tokens.index_select(0, one).mul_(candidates.index_select(0, other)).sum(dim=-1)
        found.append((one, other, exact))
    token, candidate, exact = map(torch.cat, zip(*found, strict=True))
    value = exact.new_full((asking,), -torch.inf).scatter_reduce_(0, token, exact, "amax")
    first = candidate.masked_fill_(exact < value[token], count)
    index = candidate.new_full((asking,), count).scatter_reduce_(0, token, first, "amin")
    return value.unsqueeze(0), places[index].unsqueeze(0)


def _results(search: Search) -> tuple[Tensor, Tensor]:
    shape, device = search.tokens.shape, search.tokens.device
    return torch.full(shape, -torch.inf, device=device), torch.zeros(shape, dtype=torch.long, device=device)
