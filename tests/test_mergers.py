"""Budgets, mergers and routing against the rules written out with loops, and their properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from merging_cache import BUDGETS, LayerStates, Survivors
from merging_cache.mergers import DropMerger, SimilarityMerger, routing
from merging_cache.states import gather_tokens, top_tokens

pytestmark = pytest.mark.core

OPTIONS = [
    {},
    {"similarity_threshold": 0.3},
    {"merge_fraction": 0.5},
    {"merge_fraction": 0.0},
    {"max_merge_per_token": 1},
    {"max_merge_per_token": 2, "merge_fraction": 0.75, "similarity_threshold": 0.2},
    {"value_norm_weighting": False},
    {"merge_keys": True},
    {"similarity_threshold": -1.0, "value_norm_weighting": False},
    {"similarity_threshold": 1.0},
]


def some_survivors(length, kept, batch=2, heads=3, protect=0):
    indices = torch.stack([torch.randperm(length)[:kept].sort().values for _ in range(batch * heads)])
    protected = torch.zeros(batch, heads, kept, dtype=torch.bool)
    protected[..., :protect] = True
    return Survivors(indices.view(batch, heads, kept), protected=protected)


def some_states(length, batch=2, heads=3, dim=5):
    # tokens in clusters, so that similarities spread
    keys = (
        torch.randn(batch, heads, length, dim)
        + 2 * torch.randn(batch, heads, 4, dim)[:, :, torch.randint(4, (length,))]
    )
    return LayerStates(keys, torch.randn(batch, heads, length, dim) * torch.rand(batch, heads, length, 1) * 3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("length", "kept", "protect"), [(30, 10, 0), (30, 10, 3), (7, 1, 0), (12, 11, 0), (9, 4, 4)])
def test_similarity_equals_reference(options, length, kept, protect):
    states, survivors = some_states(length), some_survivors(length, kept, protect=protect)
    slots = SimilarityMerger(**options).merge(states, survivors)
    for row in range(2):
        for head in range(3):
            indices = survivors.indices[row, head].tolist()
            keys, values, merged, dropped = reference.similarity_merge(
                states.keys[row, head].double().tolist(),
                states.values[row, head].double().tolist(),
                indices,
                set(indices[:protect]),
                **options,
            )
            torch.testing.assert_close(slots.keys[row, head], torch.tensor(keys), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(slots.values[row, head], torch.tensor(values), rtol=1e-4, atol=1e-5)
            assert (slots.num_merged[row, head], slots.num_dropped[row, head]) == (merged, dropped)
    assert torch.equal(slots.positions, survivors.indices)


def test_tiles_do_not_change_the_result(monkeypatch):
    states, survivors = some_states(60), some_survivors(60, 20, protect=2)
    merger = SimilarityMerger(merge_keys=True)
    whole = merger.merge(states, survivors)
    monkeypatch.setattr(routing, "TILE", 64)
    tiled = merger.merge(states, survivors)
    torch.testing.assert_close(tiled.values, whole.values, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(tiled.keys, whole.keys, rtol=1e-6, atol=1e-7)
    assert torch.equal(tiled.num_merged, whole.num_merged)


def test_merging_is_deterministic():
    states, survivors = some_states(200), some_survivors(200, 20)
    first, second = (SimilarityMerger().merge(states, survivors) for _ in range(2))
    assert torch.equal(first.values, second.values)


def test_equal_keys_go_to_the_later_survivor():
    keys = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])[None, None]
    plan = routing.nearest_survivors(keys, Survivors(torch.tensor([[[0, 2, 3]]])))
    assert plan.target.tolist() == [[[1]]]


def test_untouched_survivors_keep_their_bits():
    states, survivors = some_states(40), some_survivors(40, 12)
    states = LayerStates(states.keys.bfloat16(), states.values.bfloat16())
    slots = SimilarityMerger(max_merge_per_token=1, merge_fraction=0.2).merge(states, survivors)
    own = gather_tokens(states.values, survivors.indices)
    same = (slots.values == own).all(-1)
    assert ((~same).sum(-1) <= slots.num_merged).all()
    assert same.any()


def test_drop_keeps_exact_survivors():
    states, survivors = some_states(40), some_survivors(40, 12)
    slots = DropMerger().merge(states, survivors)
    for row in range(2):
        for head in range(3):
            assert torch.equal(slots.keys[row, head], states.keys[row, head][survivors.indices[row, head]])
            assert torch.equal(slots.values[row, head], states.values[row, head][survivors.indices[row, head]])
    assert (slots.num_dropped == 28).all()
    assert (slots.num_merged == 0).all()


def test_log_mass_follows_the_survivors():
    states, survivors = some_states(20), some_survivors(20, 6)
    mass = torch.rand(2, 3, 20)
    states = LayerStates(states.keys, states.values, log_mass=mass)
    for merger in (DropMerger(), SimilarityMerger()):
        assert torch.equal(merger.merge(states, survivors).log_mass, mass.gather(2, survivors.indices))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_top_tokens_breaks_ties_by_position(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    got = top_tokens(torch.tensor(scores, dtype=torch.float32)[None, None], count)
    assert got[0, 0].tolist() == reference.top_tokens(scores, count)


@given(st.integers(2, 40), st.data())
def test_counts_and_bounds(length, data):
    kept = data.draw(st.integers(1, length))
    torch.manual_seed(length * 100 + kept)
    states, survivors = some_states(length), some_survivors(length, kept)
    slots = SimilarityMerger().merge(states, survivors)
    assert (slots.num_merged + slots.num_dropped + kept == length).all()
    # a weighted mean stays inside the range of what is averaged
    assert (slots.values.amax(2) <= states.values.amax(2) + 1e-5).all()
    assert (slots.values.amin(2) >= states.values.amin(2) - 1e-5).all()


def test_evicted_is_the_complement():
    survivors = some_survivors(15, 6)
    evicted = survivors.evicted(15)
    both = torch.cat([survivors.indices, evicted], 2).sort(-1).values
    assert torch.equal(both, torch.arange(15).expand(2, 3, 15))
    assert torch.equal(evicted, evicted.sort(-1).values)


def test_uniform_budget_gives_every_head_the_same():
    scores = torch.randn(2, 3, 20)
    survivors = BUDGETS["uniform"]().allocate(scores, some_states(20), 7)
    assert survivors.indices.tolist() == [[reference.top_tokens(head.tolist(), 7) for head in row] for row in scores]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity_threshold": 2}, "similarity_threshold is 2"),
        ({"merge_fraction": 1.5}, "merge_fraction is 1.5"),
        ({"max_merge_per_token": -1}, "max_merge_per_token is -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        SimilarityMerger(**options)
