"""Where every token went: by one-hot values that tell, and what is drawn and written of it."""

import json
import pickle
import re

import pytest
import torch

from merging_cache import BUDGETS, MERGERS, LayerStates, MergingConfig, MergingDynamicCache, plot_merges
from merging_cache.model import cache_argument
from merging_cache.states import ABSENT, DROPPED
from models import llama

WORDS = [f"word{i}" for i in range(60)]


def one_hot_states(seed: int, length: int = 40) -> LayerStates:
    """Values that name their token, so that a slot's value names all that it holds."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn((2, 3, length, 16), generator=generator)
    queries = torch.randn((2, 6, 12, 16), generator=generator)
    values = torch.eye(length).expand(2, 3, length, length).clone()
    return LayerStates(keys, values, queries=queries, query_positions=torch.arange(length - 12, length), traced=True)


@pytest.mark.parametrize(
    "merger",
    [
        "drop",
        "similarity",
        {"name": "similarity", "similarity_threshold": 0.3, "max_merge_per_token": 2},
        "count",
        {"name": "count", "routing": "distance"},
        {"name": "mass", "queries": "last"},
        {"name": "mass", "queries": "last", "routing": "attention", "least_explained": 0.2},
        {"name": "residual", "queries": "last", "share": 0.5},
        {"name": "residual", "queries": "last", "share": 0.5, "clusters": "keys"},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_holders_are_what_the_values_say(merger, seed):
    states = one_hot_states(seed)
    fold = MergingConfig(scorer="knorm", merger=merger, sink_tokens=2, recent_tokens=3).build(linked=True)
    slots = fold(states, 15)
    told = torch.full((2, 3, 40), DROPPED)
    rows, heads, index, tokens = (slots.values > 0).nonzero().T
    told[rows, heads, tokens] = slots.positions[rows, heads, index]
    assert torch.equal(slots.holders, told)
    own = slots.holders == torch.arange(40)
    named = torch.zeros_like(own).scatter(2, slots.positions, True)
    assert (named >= own).all()
    if not isinstance(merger, dict) or merger["name"] != "residual":
        assert torch.equal(named, own)
        assert torch.equal(slots.num_merged, ((slots.holders >= 0) & ~own).sum(2))
    assert torch.equal(slots.num_dropped, (slots.holders == DROPPED).sum(2))


@pytest.mark.parametrize("merger", ["refit", "validated", "cam"])
def test_mergers_that_change_values_otherwise_tell_too(merger):
    states = one_hot_states(0)
    fold = MergingConfig(scorer="knorm", merger={"name": merger, "queries": "last"}).build(linked=True)
    slots = fold(states, 15)
    own = slots.holders == torch.arange(40)
    assert torch.equal(own, torch.zeros_like(own).scatter(2, slots.positions, True))
    assert torch.equal(slots.num_merged, ((slots.holders >= 0) & ~own).sum(2))
    assert torch.equal(slots.num_dropped, (slots.holders == DROPPED).sum(2))
    assert (slots.holders[..., None, :] == slots.positions.unsqueeze(-1)).any(2).sum() == (slots.holders >= 0).sum()


def test_nothing_is_kept_unless_asked_for():
    states = one_hot_states(0)
    fold = MergingConfig(scorer="knorm", merger="similarity").build()
    assert fold(LayerStates(states.keys, states.values), 15).holders is None
    model = llama()
    cache = MergingDynamicCache(config=model.config)
    model(torch.arange(1, 61)[None], **cache_argument(cache))
    traced = MergingDynamicCache(config=model.config, trace=True)
    model(torch.arange(1, 61)[None], **cache_argument(traced))
    heads = model.config.num_key_value_heads
    for plain, telling in zip(cache.layers, traced.layers, strict=True):
        assert plain.tally.holders is None
        assert telling.nbytes - plain.nbytes == 4 * heads * 60
        assert torch.equal(plain.keys, telling.keys)
        assert torch.equal(plain.values, telling.values)


@pytest.mark.parametrize("merger", sorted(MERGERS))
@pytest.mark.parametrize("budget", sorted(BUDGETS))
def test_padded_rows_over_two_turns_are_traced_as_if_alone(merger, budget):
    """Every merger with every budget; the second fold hands on what the slots of the first hold."""
    model = llama()
    ids = torch.randint(1, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    more = torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    options = {"threshold": {"threshold": -3.0, "window": 8}, "per_layer": {"weights": [1, 2]}}
    named = {"name": budget, **options.get(budget, {})}
    options = {"scorer": "keydiff", "merger": merger, "budget": named, "max_tokens": 24, "recent_tokens": 6}

    def run(rows: slice, padding: int) -> MergingDynamicCache:
        cache = MergingDynamicCache(model=model, trace=True, **options)
        both = torch.cat([mask, torch.ones_like(more)], dim=1)[rows, padding:]
        positions = (both.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            for start, end in ((0, 60 - padding), (60 - padding, 72 - padding)):
                tokens = torch.cat([ids, more], dim=1)[rows, padding + start : padding + end]
                where = {"attention_mask": both[:, :end], "position_ids": positions[:, start:end]}
                model(tokens, **cache_argument(cache), **where)
        cache.release()
        return cache

    together = run(slice(None), 0)
    for row, padding in ((0, 0), (1, 17)):
        alone = run(slice(row, row + 1), padding)
        mine, expected = together.fates(row), alone.fates(0)
        assert mine.num_tokens == expected.num_tokens == 72 - padding
        assert mine.traced
        for layer, ours, theirs in zip(together.layers, mine.holders, expected.holders, strict=True):
            assert torch.equal(ours, theirs)
            stored = layer._shared.padding.row_positions(layer.positions)[row]
            for of_head, slots in zip(ours, stored, strict=True):
                slots = slots[slots >= 0]
                assert set(of_head[of_head >= 0].tolist()) <= set(slots.tolist())
                assert torch.equal(of_head[slots], slots)
            if budget == "uniform":
                assert (ours[:, -6:] == torch.arange(72 - padding)[-6:]).all()  # the recent ones stand


def test_the_batch_is_followed_where_rows_move():
    model = llama()
    cache = MergingDynamicCache(config=model.config, trace=True, attention_mask=torch.ones(2, 60))
    model(torch.randint(1, 90, (2, 60), generator=torch.Generator().manual_seed(0)), **cache_argument(cache))
    before = [cache.fates(row).holders for row in (0, 1)]
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    for row, was in ((0, 1), (1, 0), (2, 1)):
        assert all(map(torch.equal, cache.fates(row).holders, before[was]))
    cache.reset()
    with pytest.raises(ValueError, match="the cache is empty"):
        plot_merges(cache)


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced():
    model = llama()
    options = {"merger": {"name": "similarity", "similarity_threshold": 0.6}, "recent_tokens": 6, "trace": True}
    cache = MergingDynamicCache(config=model.config, **options)
    model(torch.arange(1, 61)[None], **cache_argument(cache))
    return cache


def test_a_picture_shows_survivors_merged_and_dropped(traced):
    from matplotlib import colormaps

    figure = plot_merges(traced, WORDS)
    *panels, bar = figure.axes
    assert len(panels) == len(traced.layers)
    assert [label.get_text() for label in panels[-1].get_xticklabels()] == WORDS
    for panel, holders in zip(panels, traced.fates(0).holders, strict=True):
        (shown,) = panel.images
        pixels = torch.as_tensor(shown.get_array())
        assert pixels.shape == (*holders.shape, 4)
        own = holders == torch.arange(60)
        assert (pixels[own][:, 3] == 1).all()
        assert (pixels[(holders >= 0) & ~own][:, 3] < 0.5).all()
        grey = pixels[holders == DROPPED]
        assert len(grey)
        assert (grey[:, :3] == grey[:, :1]).all()
        head, token = ((holders >= 0) & ~own).nonzero()[0]
        colour = colormaps["turbo"](holders[head, token].item() / 59)
        assert pixels[head, token, :3].tolist() == pytest.approx(colour[:3], abs=0.01)
        dots = panel.get_lines()[0].get_xydata()
        assert {(int(y), int(x)) for x, y in dots} == {tuple(place) for place in own.nonzero().tolist()}
    figure = traced.report().plot()
    assert len(figure.axes) == len(panels) + 1
    assert bar.get_ylabel() == "position of the slot"


def test_the_page_holds_the_text_and_who_holds_it(traced, tmp_path):
    words = [*WORDS[:-1], "<b>&"]
    plot_merges(traced, words, html=tmp_path / "merges.html")
    page = (tmp_path / "merges.html").read_text()
    tokens, holders = re.search(r"const tokens = (\[.*?\]), holders = (\{.*?\});", page).groups()
    assert json.loads(tokens) == words
    assert "<b>&" not in page  # escaped where it could be taken for markup
    expected = {str(layer): holders.tolist() for layer, holders in enumerate(traced.fates(0).holders)}
    assert json.loads(holders) == expected
    assert not re.search(r"""(src|href)=["']https?:""", page)


def test_without_a_trace_only_the_survivors_are_known(tmp_path):
    model = llama()
    cache = MergingDynamicCache(config=model.config, recent_tokens=6)
    model(torch.arange(1, 61)[None], **cache_argument(cache))
    fates = cache.fates(0)
    assert not fates.traced
    for layer, holders in zip(cache.layers, fates.holders, strict=True):
        kept = torch.zeros(holders.shape, dtype=torch.bool).scatter(1, layer.positions[0], True)
        assert torch.equal(holders == torch.arange(60), kept)
        assert torch.equal(holders == ABSENT, ~kept)
    plot_merges(cache, WORDS, html=tmp_path / "page.html")
    assert "give the cache trace=True" in (tmp_path / "page.html").read_text()


def test_what_cannot_be_shown_is_said(traced):
    with pytest.raises(ValueError, match="row is 1, and the cache holds a batch of 1 rows"):
        plot_merges(traced, row=1)
    with pytest.raises(ValueError, match="59 tokens were given, but row 0 of the cache holds 60"):
        plot_merges(traced, WORDS[:59])
    for wrong in ("x" * 60, list(range(60)), torch.arange(60)):
        with pytest.raises(TypeError, match="give a list of strings"):
            plot_merges(traced, wrong)
    with pytest.raises(TypeError, match="row is True"):
        plot_merges(traced, row=True)
    with pytest.raises(TypeError, match="trace is 'no'"):
        MergingDynamicCache(config=llama().config, trace="no")
    plot_merges(traced, ["$\\foo$"] * 60).canvas.draw()  # text, not mathematics
    with pytest.raises(ValueError, match="it needs tokens="):
        plot_merges(traced, html="page.html")
    model = llama()
    cache = MergingDynamicCache(config=model.config)
    model(torch.arange(1, 61)[None], **cache_argument(cache))
    report = cache.report()
    report.plot()
    model(torch.tensor([[5]]), **cache_argument(cache))
    with pytest.raises(ValueError, match="the cache is not what it was at this report"):
        report.plot()
    report = cache.report()
    again = pickle.loads(pickle.dumps(report))
    assert again == report
    del cache
    for one in (report, again):
        with pytest.raises(ValueError, match="the cache is not what it was"):
            one.plot()
