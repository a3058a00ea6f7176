"""The budget that gives each head its own fraction: the arithmetic against loops, and when it is found."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import reference
from merging_cache import LayerStates, MergingDynamicCache, Reading
from merging_cache.budgets import ProfileBudget
from merging_cache.budgets.profile import STEPS, rounded, shares_of, table_of
from merging_cache.layers.again import middle_of
from merging_cache.model import cache_argument
from models import WINDOW, assert_same_cache, greedy, left_padded, llama, prompt, tiny_model, watch, watch_passes

pytestmark = pytest.mark.core
PROFILE = {"name": "profile", "probe_tokens": 24}
PROBE = {"scorer": {"name": "probe", "probe_tokens": 24}}


def profiled(model, **options):
    return MergingDynamicCache(
        model=model, **{"scorer": "keydiff", "budget": PROFILE, "merger": "drop"} | WINDOW | options
    )


def model_memory(cache):
    """What the model has taught the budget."""
    return cache._shared.link.memory[repr(cache._shared.fold.budget)]


def counts(cache):
    """`[layers * H]`, the slots of each head of the first row."""
    return torch.cat([layer.slots_per_head[0] for layer in cache.folding_layers])


def table_by_counting(scores):
    """What each head keeps of the best hundredth of all scores, the best two, and so on: `[N][STEPS + 1]`."""
    ranked = sorted(((score, head) for head, row in enumerate(scores) for score in row), reverse=True)
    table = []
    for step in range(STEPS + 1):
        best = ranked[: len(ranked) * step // STEPS]
        table.append([sum(head == one for _, head in best) / len(scores[one]) for one in range(len(scores))])
    return list(map(list, zip(*table, strict=True)))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_fractions_are_those_of_one_threshold(heads, hundreds, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(heads, 100 * hundreds, generator=generator) ** (1 + torch.arange(heads)[:, None])
    table = table_of(scores)
    assert table.mean(dim=0).tolist() == pytest.approx([step / STEPS for step in range(STEPS + 1)])
    expected = torch.tensor(table_by_counting(scores.tolist()), dtype=torch.double)
    torch.testing.assert_close(table, expected, rtol=0, atol=1 / scores.shape[1])


def test_equal_scores_are_shared_evenly():
    """No threshold keeps half of what is all alike."""
    table = table_of(torch.ones(3, 50))
    assert table[:, 30].tolist() == pytest.approx([0.3] * 3)
    scores = torch.cat([torch.ones(2, 50), torch.zeros(2, 50)], dim=1)
    assert table_of(scores)[:, 25].tolist() == pytest.approx([0.25] * 2)


def test_shares_lie_straight_between_hundredths():
    tables = torch.stack([table_of(torch.rand(3, 400) ** torch.tensor([[power], [1], [2]])) for power in (1, 4)])
    shares = shares_of(tables, 0.404)
    assert shares.mean(dim=1).tolist() == pytest.approx([0.404] * 2)
    torch.testing.assert_close(shares, 0.6 * tables[:, :, 40] + 0.4 * tables[:, :, 41])
    assert shares_of(tables, 1.0).tolist() == [[1.0, 1.0, 1.0]] * 2


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
    # a straight line, so that hundredths are no matter
    steps = torch.linspace(0, 1, STEPS + 1, dtype=torch.double)
    shares = torch.stack([share * steps, (2 - share) * steps]).unsqueeze(0)
    states = LayerStates(scores.unsqueeze(-1), scores.unsqueeze(-1), lesson=shares)
    kept = ProfileBudget().allocate(scores, states, num_slots).mask(length)[0]
    keep = (num_slots - 2) / (length - 2)
    wanted = 2 + rounded(torch.tensor([share, 2 - share], dtype=torch.double) * keep * (length - 2))
    for head, count in enumerate(wanted.tolist()):
        assert kept[head].nonzero().squeeze(1).tolist() == reference.top_tokens(scores[0, head].tolist(), count)


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(1, 180))
def test_the_middle_and_what_tells_of_it(asked, part):
    block, told = middle_of(torch.tensor([asked, [not one for one in asked]]), part)
    for row, mine in enumerate((asked, [not one for one in asked])):
        places = [place for place, there in enumerate(mine) if there]
        start = max(0, len(places) - part) // 2
        middle = places[start : start + part]
        assert block[row].nonzero().squeeze(1).tolist() == middle
        assert told[row].nonzero().squeeze(1).tolist() == middle[min(len(middle) // 2, 64) :]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_part_sees_a_window_of_a_long_prompt(family, monkeypatch):
    """From where it stands behind the prompt: as if the other tokens were hidden from it."""
    monkeypatch.setattr("merging_cache.layers.again.WINDOW", 40)
    model, ids = tiny_model(family), prompt(120)
    seen = watch(
        monkeypatch,
        model.model.layers[-1].self_attn,
        lambda **given: (given["hidden_states"], given["position_embeddings"]),
    )
    cache = profiled(model, scorer="keydiff", compression_ratio=0.5)
    model(ids, **cache_argument(cache))
    middle = list(range(48, 72))
    kept = [place for place in range(120) if place < 4 or abs(place - 59) <= 20]
    # the same by hand: a mask that hides the others
    expected = DynamicCache(config=model.config)
    model(ids, **cache_argument(expected))
    mask = torch.zeros(1, 120, dtype=torch.long)
    mask[0, kept if family == "llama" else slice(None)] = 1  # sliding windows hold what is newest
    model(
        ids[:, middle],
        attention_mask=torch.cat([mask, torch.ones(1, 24, dtype=torch.long)], dim=1),
        position_ids=torch.arange(120, 144)[None],
        **cache_argument(expected),
    )
    (_, mine, _, theirs) = seen
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(mine[1], theirs[1], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("scorer", ["observed_attention", "snapkv", "non_causal"])
def test_what_the_scorer_has_seen_is_left_alone(scorer, monkeypatch):
    """Tokens outside of the window, too: whether a prompt is probed or the profile is known, the same are kept."""
    monkeypatch.setattr("merging_cache.layers.again.WINDOW", 40)
    model, ids = llama(), prompt(120)
    probing, knowing = (profiled(model, scorer=scorer, compression_ratio=0.5) for _ in range(2))
    for cache in (probing, knowing):
        model(ids, **cache_argument(cache))
    assert_same_cache(knowing, probing)


@torch.no_grad()
def test_the_first_prompts_are_probed_and_later_ones_know(monkeypatch):
    """Two short second readings in all; then layers fold one by one, as they are read."""
    model, held = llama(layers=3), []
    read = watch_passes(monkeypatch, model)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: held.append([one.num_stored for one in cache.layers]))
    cache = profiled(model, compression_ratio=0.5)
    model(prompt(80), **cache_argument(cache))
    assert read == [80, 24]
    first, keep = counts(cache), held[2]
    assert keep == [80, 80, 80]  # the whole prompt until all is known
    assert 40 * 6 - 3 <= int(first.sum()) <= 40 * 6
    assert len(set(first.tolist())) > 1
    model(prompt(80, seed=3), **cache_argument(profiled(model, compression_ratio=0.5)))
    held.clear()
    read.clear()
    cache = profiled(model, compression_ratio=0.75, scorer="knorm")
    model(prompt(120, seed=4), **cache_argument(cache))
    assert read == [120]
    assert held[1][0] < 120
    assert 30 * 6 - 3 <= int(counts(cache).sum()) <= 30 * 6
    model(prompt(40, seed=5), **cache_argument(cache))
    assert read == [120, 40]


@torch.no_grad()
def test_short_prompts_are_added_up(monkeypatch):
    """Each piece speaks for itself until together they are long enough, and later for the model."""
    model = llama()
    read = watch_passes(monkeypatch, model)
    cache = profiled(model, compression_ratio=0.5)
    for seed in range(2):
        model(prompt(10, seed=seed), **cache_argument(cache))
        assert cache._shared.is_to_be_read_again
    assert profiled(model)._shared.is_to_be_read_again
    for seed in range(2, 4):
        model(prompt(10, seed=seed), **cache_argument(cache))
        assert not cache._shared.is_to_be_read_again
    assert read == [10, 10] * 3 + [10]
    for seed in range(4, 6):
        assert profiled(model)._shared.is_to_be_read_again
        model(prompt(10, seed=seed), **cache_argument(profiled(model, compression_ratio=0.5)))
    assert not profiled(model)._shared.is_to_be_read_again


@torch.no_grad()
@pytest.mark.parametrize("stages", [{}, PROBE])
def test_a_model_that_is_warmed_up_is_not_taught(stages):
    """The same token again and again, in one prompt or many, is as one or two of a text."""
    model = llama()
    cache = profiled(model, compression_ratio=0.5, **stages)
    model(torch.full((1, 80), 7), **cache_argument(cache))
    assert cache._shared.is_to_be_read_again
    assert all(one._told.tolist() == [2] for one in cache._shared.learned.values())
    model(torch.full((1, 80), 7), **cache_argument(profiled(model, compression_ratio=0.5, **stages)))
    assert profiled(model, **stages)._shared.is_to_be_read_again
    other = profiled(model, compression_ratio=0.5, **stages)
    model(inputs_embeds=model.get_input_embeddings()(torch.full((1, 80), 7)), **cache_argument(other))
    assert other._shared.is_to_be_read_again
    other = profiled(model, compression_ratio=0.5, **stages)
    model(inputs_embeds=model.get_input_embeddings()(prompt(80)), **cache_argument(other))
    assert not other._shared.is_to_be_read_again
    assert all(one.worth == 12 for one in other._shared.link.memory.values())


@torch.no_grad()
def test_a_cache_keeps_to_its_profile_until_it_is_emptied():
    """Whatever other caches of the model find out meanwhile."""
    model = llama()
    cache, other = profiled(model, compression_ratio=0.5), profiled(model, compression_ratio=0.5)
    model(prompt(10), **cache_argument(cache))
    model(prompt(60), **cache_argument(other))
    other.reset()
    model(prompt(70, seed=2), **cache_argument(other))
    assert cache._shared.is_to_be_read_again
    cache.reset()
    assert not cache._shared.is_to_be_read_again
    found = model_memory(other).lesson
    model(prompt(60, seed=3), **cache_argument(cache))
    for mine, theirs in zip(cache._shared.learned["budget"].lesson.tables, found.tables, strict=True):
        assert torch.equal(mine, theirs)


@torch.no_grad()
def test_another_model_is_probed_by_itself():
    for model in (llama(), llama()):
        cache = profiled(model, compression_ratio=0.5)
        assert cache._shared.is_to_be_read_again
        model(prompt(60), **cache_argument(cache))
        assert not cache._shared.is_to_be_read_again


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"scorer": "kvzip"}])
def test_models_may_share_a_config(options):
    """Each is read again by itself, and remembered by itself."""
    first = llama()
    second, ids = type(first)(first.config), prompt(60)
    caches = [profiled(model, compression_ratio=0.5, **options) for model in (first, second)]
    for model, cache in zip((second, first), caches[::-1], strict=True):
        model(ids, **cache_argument(cache))
    alone = profiled(fresh := llama(), compression_ratio=0.5, **options)
    fresh(ids, **cache_argument(alone))
    assert_same_cache(caches[0], alone)
    tables = [cache._shared.learned["budget"].lesson.tables for cache in caches]
    assert not all(torch.equal(*pair) for pair in zip(*tables, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("length", [0, 20])
def test_a_pickled_cache_goes_by_what_it_knows(length):
    """Without the model nothing can be read again: then all heads keep as much, or what its own prompt said."""
    model = llama()
    cache = profiled(model, compression_ratio=0.5)
    if length:
        model(prompt(length), **cache_argument(cache))
    thawed = pickle.loads(pickle.dumps(cache))
    model(prompt(60, seed=3), **cache_argument(thawed))
    assert thawed.layers[0].num_slots
    assert thawed.get_seq_length() == length + 60


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("again", [{}, {"scorer": "kvzip"}, {"scorer": "kvzip", "budget": "global"}, PROBE])
def test_padded_rows_equal_the_row_alone(known, pieces, again):
    """Before anything is known of the model each row is probed for itself, be it that others know enough."""
    lengths, width = [60, 41, 12], 60
    inputs, options = left_padded(lengths), {"merger": "auto", "max_tokens": 20} | again
    cuts = [round(width * piece / pieces) for piece in range(pieces + 1)]

    @torch.no_grad()
    def read(rows, first):
        """The rows without their first tokens, cut where the whole batch is."""
        model = llama()
        if known:
            model(prompt(80), **cache_argument(profiled(model, **again)))
        cache = profiled(model, **options)
        for start, end in itertools.pairwise(cuts):
            if end > first:
                mask = inputs["attention_mask"][rows, first:end]
                output = model(
                    inputs["input_ids"][rows, max(start, first) : end],
                    attention_mask=mask,
                    position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0)[:, max(start, first) - first :],
                    **cache_argument(cache),
                )
        for token in prompt(3, seed=9)[0]:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            output = model(
                token.expand(len(mask), 1),
                attention_mask=mask,
                position_ids=mask.sum(dim=1, keepdim=True) - 1,
                **cache_argument(cache),
            )
        return output.logits[:, -1], cache

    together, cache = read(slice(None), 0)
    for row, length in enumerate(lengths):
        logits, alone = read(slice(row, row + 1), width - length)
        torch.testing.assert_close(together[row], logits[0], rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(cache.layers, alone.layers, strict=True):
            assert not theirs.num_slots or torch.equal(mine.slots_per_head[row], theirs.slots_per_head[0])


def test_beams_keep_their_rows_profile():
    """What a row was told goes where the row goes."""
    model, inputs = llama(), left_padded([60, 41])
    cache = profiled(model, max_tokens=20)
    greedy(model, inputs, **cache_argument(cache))
    before = [one.clone() for one in cache._shared.learned["budget"].lesson.tables]
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    for mine, theirs in zip(cache._shared.learned["budget"].lesson.tables, before, strict=True):
        assert torch.equal(mine, theirs[[1, 1, 0]])


@torch.no_grad()
def test_copies_pickles_and_readings():
    model, ids = llama(), prompt(60)
    cache = profiled(model, compression_ratio=0.5)
    model(ids, **cache_argument(cache))
    thawed = pickle.loads(pickle.dumps(cache))
    known = zip(
        thawed._shared.learned["budget"].lesson.tables, cache._shared.learned["budget"].lesson.tables, strict=True
    )
    assert all(torch.equal(*pair) for pair in known)
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
