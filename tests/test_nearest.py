"""The engines that find nearest survivors, against all products in fp64, and what they do with few bits."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from merging_cache import BUDGETS, LayerStates
from merging_cache.mergers import SimilarityMerger, nearest
from merging_cache.mergers.nearest import BFloat16, Int8, Search
from merging_cache.scorers import KeyDiffScorer

pytestmark = pytest.mark.core


def gaussian(length, dim=24, heads=3):
    return torch.randn(heads, length, dim)


def clusters(length):
    return gaussian(length, heads=3) + 3 * gaussian(4)[:, torch.randint(4, (length,))]


def offset(length):
    """What RoPE leaves of a bias: a large constant, a large rotating pair, and little else."""
    angle = torch.arange(length) * 0.3
    vectors = gaussian(length)
    vectors[..., 0] += 30
    vectors[..., 1] += 8 * angle.cos()
    vectors[..., 2] += 8 * angle.sin()
    return vectors


def tied(length):
    """Every vector several times."""
    return gaussian(7)[:, torch.arange(length) % 7]


def equal(length):
    return torch.ones(3, length, 24)


FEATURES = [gaussian, clusters, offset, tied, equal]


def make_search(features, kept, closed=(), scaled=True, positions=None, window=None):
    heads, length, _ = features.shape
    order = torch.stack([torch.randperm(length) for _ in range(heads)])
    candidates, tokens = order[:, :kept].sort(dim=1, descending=True).values, order[:, kept:].sort(dim=1).values
    bias = torch.zeros(heads, kept)
    bias[:, list(closed)] = -torch.inf
    scale = torch.linalg.vector_norm(features, dim=-1).reciprocal() if scaled else None
    return Search(features, scale, tokens, candidates, bias, positions=positions, window=window)


def assert_is_nearest(search, value, index):
    """The largest product in fp64 to within rounding; of candidates that are equal the first."""
    vectors = (
        search.features.double() if search.scale is None else search.features.double() * search.scale.unsqueeze(-1)
    )
    asking, candidates = (
        vectors.gather(1, part.unsqueeze(-1).expand(-1, -1, vectors.shape[-1]))
        for part in (search.tokens, search.candidates)
    )
    products = asking @ candidates.mT + search.bias.unsqueeze(1)
    if search.window is not None:
        apart = search.positions.gather(1, search.tokens).unsqueeze(2) - search.positions.gather(
            1, search.candidates
        ).unsqueeze(1)
        products = products.masked_fill(apart.abs() > search.window, -torch.inf)
    best = products.amax(dim=-1)
    torch.testing.assert_close(value.double(), best, rtol=1e-5, atol=1e-5)
    chosen = products.gather(2, index.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, best, rtol=1e-6, atol=1e-6)
    same = (candidates.unsqueeze(1) == candidates.gather(1, index.unsqueeze(-1).expand_as(asking)).unsqueeze(2)).all(-1)
    first = (same & ~products.isneginf()).long().argmax(dim=-1)
    assert torch.equal(index[~best.isneginf()], first[~best.isneginf()])


@pytest.fixture(scope="module")
def kernel():
    """The Triton kernel; without a GPU Triton interprets it, see `conftest.py`."""
    pytest.importorskip("triton")
    return nearest.triton_kernel()


def on_device(search):
    """Where the kernel can run."""
    if not torch.cuda.is_available():
        return search
    parts = {one.name: getattr(search, one.name) for one in fields(search)}
    return Search(**{name: part.cuda() if isinstance(part, torch.Tensor) else part for name, part in parts.items()})


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    ("length", "kept", "closed"), [(300, 140, ()), (301, 77, (0, 5, 76)), (40, 1, ()), (50, 20, range(20))]
)
@pytest.mark.parametrize("scaled", [True, False])
def test_the_kernel_finds_the_nearest(kernel, features, length, kept, closed, scaled):
    search = on_device(make_search(features(length), kept, closed, scaled))
    assert_is_nearest(search, *nearest.fused(search, kernel))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_the_kernel_multiplies_half_precision_exactly(kernel, dtype):
    """Not so in Triton's interpreter in bfloat16."""
    search = on_device(make_search(gaussian(300, dim=128).to(dtype), 140))
    value, index = nearest.fused(search, kernel)
    expected = nearest.tiled(search)
    torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=1e-5)
    assert (index == expected[1]).float().mean() > 0.99


def in_few_bits(precision):
    def run(search):
        found = [nearest.screen(search.head(head), precision) for head in range(len(search.tokens))]
        return [part if part is not None else nearest.tiled(search.head(i)) for i, part in enumerate(found)]

    return lambda search: tuple(torch.cat(parts) for parts in zip(*run(search), strict=True))


ENGINES = {"tiled": nearest.tiled, "int8": in_few_bits(Int8), "bfloat16": in_few_bits(BFloat16)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    ("length", "kept", "closed"), [(300, 128, ()), (301, 77, (0, 5, 76)), (40, 1, ()), (9, 8, range(7))]
)
def test_engines_find_the_nearest(engine, features, length, kept, closed):
    search = make_search(features(length), kept, closed)
    assert_is_nearest(search, *ENGINES[engine](search))


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_to_choose_from(engine):
    search = make_search(gaussian(50), 20, range(20))
    value, index = ENGINES[engine](search)
    assert value.isneginf().all()
    assert ((index >= 0) & (index < 20)).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_tile_at_a_time_is_the_same(engine, monkeypatch):
    search = make_search(gaussian(200), 96, (3,))
    whole = ENGINES[engine](search)
    monkeypatch.setattr(nearest, "TILE", 96 * 40)
    torch.testing.assert_close(ENGINES[engine](search), whole)


@pytest.mark.parametrize("precision", [Int8, BFloat16])
@pytest.mark.parametrize("features", [gaussian, clusters, tied])
def test_a_panel_of_candidates_at_a_time_is_the_same(precision, features, monkeypatch):
    search = make_search(features(500), 150, range(3, 90)).head(0)
    monkeypatch.setattr(nearest, "FEW", 150)
    whole = nearest.screened_panels(search, precision)
    monkeypatch.setattr(nearest, "PANEL", 40)
    for part, expected in zip(nearest.screened_panels(search, precision), whole, strict=True):
        assert torch.equal(part, expected)
    assert_is_nearest(search, *whole)


@pytest.mark.parametrize("precision", [Int8, BFloat16])
def test_few_bits_are_enough_or_refused(precision):
    """Where rounding could confuse many candidates nothing is answered; else the answer is that of fp32."""
    assert nearest.screen(make_search(equal(400), 200).head(0), precision) is None
    torch.manual_seed(0)
    assert nearest.screen(make_search(gaussian(400), 200).head(0), precision) is not None


@pytest.mark.parametrize("precision", [Int8, BFloat16])
@pytest.mark.parametrize("flushing", [False, True])
def test_zeros_go_to_no_closed_candidate(precision, flushing):
    """Nothing tells a zero vector's candidates apart, but that some are closed."""
    search = make_search(gaussian(400)[:1], 40, range(20), scaled=False)
    search.features[:, search.tokens[0, ::30]] = 0.0
    torch.set_flush_denormal(flushing)
    try:
        value, index = nearest.screen(search, precision)
    finally:
        torch.set_flush_denormal(False)
    assert (value[:, ::30] == 0).all()
    assert ((index >= 20) & (index < 40)).all()


@pytest.mark.parametrize("precision", [Int8, BFloat16])
def test_a_single_candidate_that_is_zero(precision):
    search = make_search(gaussian(34)[:1], 1, scaled=False)
    search.features[:, search.candidates[0]] = 0.0
    value, index = nearest.screen(search, precision)
    assert (value == 0).all()
    assert (index == 0).all()


def test_unscaled_features():
    search = make_search(gaussian(120), 50, scaled=False)
    for engine in ENGINES.values():
        assert_is_nearest(search, *engine(search))


def test_small_and_large_searches_agree(monkeypatch):
    search = make_search(clusters(300), 100)
    small = search.run()
    monkeypatch.setattr(nearest, "SMALL", 0)
    monkeypatch.setattr(nearest, "precisions", lambda device: (Int8, BFloat16))
    assert torch.equal(search.run()[1], small[1])
    monkeypatch.setattr(nearest, "precisions", lambda device: ())
    assert torch.equal(search.run()[1], small[1])


@given(
    length=st.integers(2, 200),
    kept=st.floats(0.01, 0.99),
    window=st.integers(1, 90),
    gaps=st.booleans(),
    tile=st.sampled_from([1, 5000, 1 << 22]),
    engine=st.sampled_from([nearest.local, nearest.tiled]),
    seed=st.integers(0, 10**6),
)
def test_local_finds_the_nearest_within_its_window(length, kept, window, gaps, tile, engine, seed):
    torch.manual_seed(seed)
    features = tied(length) if seed % 2 else gaussian(length)
    positions = (torch.randint(1, 9, (3, length)) if gaps else torch.ones(3, length, dtype=torch.long)).cumsum(dim=1)
    count = min(length - 1, max(1, int(kept * length)))
    search = make_search(features, count, range(0, count, 5), positions=positions, window=window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "TILE", tile)
        assert_is_nearest(search, *engine(search))


def test_few_tokens_ask_without_blocks(monkeypatch):
    """A turn of a few tokens after a long context costs as many products as tokens, and not all blocks."""
    positions = torch.arange(1000).expand(3, -1)
    few, many = (make_search(gaussian(1000), kept, positions=positions, window=20) for kept in (990, 500))
    assert_is_nearest(few, *few.run())
    assert_is_nearest(many, *many.run())
    monkeypatch.setattr(nearest, "local", lambda search: "blocks")
    assert few.run() != "blocks"
    assert many.run() == "blocks"


def test_folds_ask_nothing_of_the_device(monkeypatch):
    """Choosing and merging run on tensors without data, so no size or branch waits for what a GPU computes."""
    monkeypatch.setattr(nearest, "precisions", lambda device: ())
    for options in ({}, {"log_mass": True}, {"merge_keys": True}, {"routing": "local", "window": 16}):
        with FakeTensorMode():
            states = LayerStates(torch.empty(2, 3, 2048, 16), torch.empty(2, 3, 2048, 16), known_seen=2048)
            scores = KeyDiffScorer().score(states)
            survivors = BUDGETS["uniform"]().allocate(scores, states, 640)
            survivors = replace(survivors, protected=scores.gather(2, survivors.indices).isposinf())
            slots = SimilarityMerger(**options).merge(states, survivors)
            assert states.rows_agree
            assert slots.values.shape == (2, 3, 640, 16)
