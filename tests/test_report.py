"""The report: its numbers against the storage itself, and its table."""

import copy
import pickle

import pytest
import torch

from merging_cache import MergingDynamicCache, merging_attention
from merging_cache.mergers import DropMerger
from merging_cache.model import cache_argument
from models import CACHES, WINDOW, greedy, llama, prompt, tiny_model

pytestmark = pytest.mark.core


def test_numbers():
    model = llama()
    cache = CACHES["dynamic"](model, compression_ratio=0.5)
    greedy(model, prompt(64), **cache_argument(cache), new_tokens=3)
    report = cache.report()
    total = report.total
    assert (total.tokens_seen, total.slots) == (66, 2 * 34)
    assert total.tokens_merged + total.tokens_dropped == 2 * 32
    element = 2 * 16 * 4 * 2  # heads, dimension, bytes, keys and values
    assert total.bytes_full == 2 * 66 * element
    room = 33 + 33 // 16  # one append grew the buffer
    assert total.bytes_now == 2 * (room * element + 2 * 32 * 4 + 2 * 2 * 8)
    for row, layer in zip(report.layers, cache.layers, strict=True):
        assert row.tokens_merged == layer.num_merged.float().mean()
        assert row.bytes_now == layer.nbytes


def test_an_empty_cache():
    report = MergingDynamicCache().report()
    assert report.layers == ()
    assert (report.total.tokens_seen, report.total.slots, report.total.bytes_now, report.total.bytes_full) == (
        0,
        0,
        0,
        0,
    )
    assert str(report).splitlines()[0].split()[:3] == ["layer", "kind", "seen"]


def test_the_table_is_aligned():
    model = tiny_model("gemma3_text")
    cache = CACHES["dynamic"](model, compression_ratio=0.5)
    model(prompt(1200), **cache_argument(cache))
    *lines, advice = str(cache.report()).splitlines()
    assert advice.startswith("Given the config only. With model=model it would go by ")
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 1 + 1 + 2 + 1 + 1
    assert "folding" in lines[3]
    assert "1,200" in lines[3]
    assert lines[-1].startswith("all")
    # the columns end where their titles end
    for title in ("seen", "slots", "bytes", "share"):
        end = lines[0].index(f"{title}") + len(title)
        assert all(line[end - 1] != " " for line in lines[2:4])


def test_it_says_what_the_model_would_give():
    """Where it was not given, and would change something."""
    model = llama()
    report = MergingDynamicCache(config=model.config).report()
    stages = "probe, profile and refit"
    expected = f"Given the config only. With model=model it would go by {stages}; the defaults answer far better so."
    assert report.advice == expected
    assert str(report).endswith(report.advice)
    assert copy.deepcopy(report).advice == report.advice
    same = {"scorer": "keydiff", "budget": "uniform", "merger": "drop"}
    for cache in (
        MergingDynamicCache(config=model.config, **same),
        MergingDynamicCache(config=model.config, compression_ratio=0),
        MergingDynamicCache(model=model),
        pickle.loads(pickle.dumps(MergingDynamicCache(model=model))),
        MergingDynamicCache(model=tiny_model("jetmoe")),  # which cannot be linked
    ):
        assert not cache.report().advice
        cache.release()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_keys_and_values_of_other_precisions_are_counted_as_such(dtypes):
    keys, values = (torch.randn(2, 3, 40, 8, dtype=dtype) for dtype in dtypes)
    cache = MergingDynamicCache(max_tokens=20, merger="drop", **WINDOW)
    cache.update(keys, values, 0)
    row = cache.report().layers[0]
    assert row.bytes_full == keys.nbytes + values.nbytes == 2 * 3 * 40 * 8 * 6
    assert (cache.layers[0].keys.dtype, cache.layers[0].values.dtype) == dtypes
    assert row.bytes_now >= 2 * 3 * 20 * 8 * 6


def test_linear_layers_are_counted():
    model = tiny_model("qwen3_next")
    cache = CACHES["dynamic"](model, compression_ratio=0.5)
    if not any("Linear" in type(layer).__name__ for layer in cache.layers):
        pytest.skip("this transformers gives the family a cache of its own")
    model(prompt(40), **cache_argument(cache))
    rows = {row.kind: row for row in cache.report().layers}
    linear = next(layer for layer in cache.layers if "Linear" in type(layer).__name__)
    held = [*linear.conv_states.values(), *linear.recurrent_states.values()]
    assert rows["LinearAttentionLayer"].bytes_now == sum(t.nbytes for t in held if isinstance(t, torch.Tensor))


def test_slots_are_the_mean_over_heads_of_different_lengths():
    model = llama()
    scorer, budget = {"name": "snapkv", "window_size": 8}, {"name": "adakv", "safeguard": 0.1}
    cache = MergingDynamicCache(model=model, scorer=scorer, budget=budget, **WINDOW)
    model(prompt(64), **cache_argument(cache))
    model(prompt(1), **cache_argument(cache))
    counts = [(layer.positions >= 0).sum(dim=-1) for layer in cache.layers]
    assert any(len(count.unique()) > 1 for count in counts)
    assert [row.slots for row in cache.report().layers] == [33, 33]
    assert all(torch.equal(layer.stored_per_head, count) for layer, count in zip(cache.layers, counts, strict=True))


@torch.no_grad()
def test_it_says_which_stages_ran():
    """The defaults are one thing with the model, and another without, or where the model cannot be linked."""
    model, ids = llama(), prompt(64)
    caches = {
        ("probe", "profile", "refit"): MergingDynamicCache(model=model, **WINDOW),
        ("keydiff", "uniform", "drop"): MergingDynamicCache(config=model.config, **WINDOW),
        ("cap", "profile", "count(routing='distance')"): MergingDynamicCache(
            model=model, scorer="cap", merger={"name": "count", "routing": "distance"}, **WINDOW
        ),
    }
    for (scorer, budget, merger), cache in caches.items():
        model(ids, **cache_argument(cache))
        assert [(row.scorer, row.budget, row.merger) for row in cache.report().layers] == [(scorer, budget, merger)] * 2
        assert str(cache.report()).splitlines()[2].split()[-3:] == [scorer, budget, merger]
        assert (cache.layers[0].log_mass is None) == (merger == "drop")
    with merging_attention(model):
        assert MergingDynamicCache(config=model.config).layers[0].merger == DropMerger()
    assert MergingDynamicCache(model=tiny_model("jetmoe")).report().layers[0].merger == "drop"
    assert MergingDynamicCache(model=model, compression_ratio=0).report().layers[0].merger == "-"
    outside = tiny_model("xglm", attention="eager")
    cache = MergingDynamicCache(model=outside, **WINDOW)
    outside(ids, **cache_argument(cache))
    assert cache.report().layers[0].merger == "drop"
    assert cache.layers[0].num_dropped.any()
