"""The budget that gives each head its own fraction: the arithmetic against loops, and when it is found."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from merging_cache import LayerStates, MergingDynamicCache, Reading
from merging_cache.budgets import ProfileBudget
from merging_cache.budgets.profile import LEVELS, Profile, rounded, table_of
from merging_cache.layers.profiled import middle
from merging_cache.model import cache_argument
from models import WINDOW, assert_same_cache, greedy, left_padded, llama, prompt

pytestmark = pytest.mark.core
PROFILE = {"name": "profile", "probe_tokens": 24}


def profiled(model, **options):
    return MergingDynamicCache(model=model, **{"budget": PROFILE, "merger": "drop"} | WINDOW | options)


def counts(cache):
    """`[layers * H]`, the slots of each head of the first row."""
    return torch.cat([layer.slots_per_head[0] for layer in cache.folding_layers])


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.floats(0.0, 1.0), st.integers(0, 10**6))
def test_fractions_are_those_of_one_threshold(heads_of_layers, keep, seed):
    generator = torch.Generator().manual_seed(seed)
    powers = [1 + 3 * torch.rand(heads, 1, generator=generator) for heads in heads_of_layers]
    layers = [torch.rand(len(power), 2000, generator=generator) ** power for power in powers]
    tables = [table_of([scores]) for scores in layers]
    profile = Profile(tables, torch.cat(tables, dim=1))
    shares = torch.cat([profile.shares(layer, keep)[0] for layer in range(len(layers))])
    assert shares.mean().item() == pytest.approx(keep, abs=1e-6)
    assert ((shares >= 0) & (shares <= 1)).all()
    scores = torch.cat(layers)
    ranked = scores.flatten().sort(descending=True).values
    threshold = ranked[min(len(ranked) - 1, round(keep * len(ranked)))]
    exact = (scores > threshold).double().mean(dim=1)
    torch.testing.assert_close(shares, exact, rtol=0, atol=2 / LEVELS)


def test_equal_scores_are_shared_evenly():
    """No threshold keeps half of what is all alike."""
    tables = [table_of([torch.ones(2, 50)]), table_of([torch.ones(1, 50)])]
    profile = Profile(tables, torch.cat(tables, dim=1))
    assert profile.shares(0, 0.3)[0].tolist() == pytest.approx([0.3, 0.3])
    assert profile.shares(1, 0.3)[0].tolist() == pytest.approx([0.3])


def test_each_row_has_its_own_threshold():
    rows = [torch.rand(3, 400) ** power for power in (1, 4)]
    tables = [table_of([one[:2] for one in rows]), table_of([one[2:] for one in rows])]
    together = Profile(tables, torch.cat(tables, dim=1))
    for row in range(2):
        alone = together.select_rows(torch.tensor([row]))
        for layer in range(2):
            assert torch.equal(together.shares(layer, 0.4)[row], alone.shares(layer, 0.4)[0])


@given(st.lists(st.floats(0, 50), min_size=1, max_size=9))
def test_rounding_keeps_the_sum(numbers):
    whole = rounded(torch.tensor(numbers, dtype=torch.double)).tolist()
    assert sum(whole) == int(sum(numbers) + 1e-6)
    assert all(abs(one - number) < 1 for one, number in zip(whole, numbers, strict=True))


@given(st.integers(6, 30), st.integers(3, 30), st.data())
def test_heads_keep_their_best(length, num_slots, data):
    """The tokens that must stay first, then the share of the others that is theirs."""
    num_slots = min(num_slots, length)
    values = data.draw(st.lists(st.integers(-3, 3), min_size=2 * length, max_size=2 * length))
    share = data.draw(st.floats(0, 1))
    scores = torch.tensor(values).float().view(1, 2, length)
    scores[..., 0] = scores[..., -1] = torch.inf
    asked = []

    def shares(keep):
        asked.append(keep)
        return torch.tensor([[share, max(0.0, min(1.0, 2 * keep - share))]], dtype=torch.double)

    states = LayerStates(scores.unsqueeze(-1), scores.unsqueeze(-1), head_shares=shares)
    kept = ProfileBudget().allocate(scores, states, num_slots).mask(length)[0]
    (keep,) = asked
    assert keep == pytest.approx((num_slots - 2) / (length - 2))
    wanted = 2 + rounded(shares(keep) * (length - 2))[0]
    for head, count in enumerate(wanted.tolist()):
        assert kept[head].nonzero().squeeze(1).tolist() == reference.top_tokens(scores[0, head].tolist(), count)


def test_the_middle():
    assert [list(range(10))[middle(10, part)] for part in (None, 4, 3, 10, 99)] == [
        list(range(10)),
        [3, 4, 5, 6],
        [3, 4, 5],
        list(range(10)),
        list(range(10)),
    ]


@torch.no_grad()
def test_the_first_prompt_is_probed_and_later_ones_know():
    """One short second reading in all; then layers fold one by one, as they are read."""
    model, read, held = llama(layers=3), [], []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: held.append([one.num_stored for one in cache.layers]))
    cache = profiled(model, compression_ratio=0.5)
    model(prompt(80), **cache_argument(cache))
    assert read == [80, 24]
    first, keep = counts(cache), held[2]
    assert keep == [80, 80, 80]  # the whole prompt until all is known
    assert 40 * 6 - 3 <= int(first.sum()) <= 40 * 6
    assert len(set(first.tolist())) > 1
    held.clear()
    cache = profiled(model, compression_ratio=0.75, scorer="knorm")
    model(prompt(120, seed=4), **cache_argument(cache))
    assert read == [80, 24, 120]
    assert held[1][0] < 120
    assert 30 * 6 - 3 <= int(counts(cache).sum()) <= 30 * 6
    model(prompt(40, seed=5), **cache_argument(cache))
    assert read == [80, 24, 120, 40]


@torch.no_grad()
def test_a_short_prompt_speaks_for_itself_only():
    model = llama()
    cache = profiled(model, compression_ratio=0.5)
    for _ in range(2):  # and what comes after it once more
        model(prompt(20), **cache_argument(cache))
        assert cache._shared.is_to_be_read_again
    assert profiled(model)._shared.is_to_be_read_again


@torch.no_grad()
def test_another_model_is_probed_by_itself():
    for model in (llama(), llama()):
        cache = profiled(model, compression_ratio=0.5)
        assert cache._shared.is_to_be_read_again
        model(prompt(60), **cache_argument(cache))
        assert not cache._shared.is_to_be_read_again


@pytest.mark.parametrize("known", [False, True])
def test_padded_rows_equal_the_row_alone(known):
    """Before anything is known of the model each row is probed for itself."""
    model, lengths = llama(), [60, 41, 12]
    if known:
        model(prompt(80), **cache_argument(profiled(model)))
    inputs = left_padded(lengths)
    options = {"merger": "auto", "max_tokens": 20}
    together = greedy(model, inputs, **cache_argument(profiled(model, **options)))
    for row, length in enumerate(lengths):
        ids = inputs["input_ids"][row : row + 1, -length:]
        if not known:
            model = llama()
        alone = greedy(model, ids, **cache_argument(profiled(model, **options)))
        for mine, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copies_pickles_and_readings():
    model, ids = llama(), prompt(60)
    cache = profiled(model, compression_ratio=0.5)
    model(ids, **cache_argument(cache))
    thawed = pickle.loads(pickle.dumps(cache))
    assert torch.equal(thawed._shared.profiled.profile.everyone, cache._shared.profiled.profile.everyone)
    twin = copy.deepcopy(cache)
    more = prompt(40, seed=3)
    for one in (cache, twin):
        model(more, **cache_argument(one))
    assert_same_cache(twin, cache)
    fresh, other = llama(), llama()  # of which nothing is known
    by_reading = Reading(fresh, ids).fill(profiled(fresh, compression_ratio=0.5))
    by_prefill = profiled(other, compression_ratio=0.5)
    other(ids, **cache_argument(by_prefill))
    assert_same_cache(by_reading, by_prefill)
