"""Differential test: the survivors that our scorers choose are those that an installed kvpress chooses."""

import pytest
import torch
from transformers import DynamicCache

from merging_cache import MergingDynamicCache
from merging_cache.evaluation import Evaluation, EvaluationConfig, Summary
from merging_cache.model import cache_argument
from models import VOCABULARY, llama

kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed")

import compare_kvpress  # noqa: E402
from merging_cache.scorers import KVPressScorer  # noqa: E402

LENGTH = 90
# how many tokens are kept: numbers at which lagkv, whose scores are ranks in blocks of 16, has no ties to break
KEPT = [26, 46, 66]
# our scorer with its options, and kvpress's press with its own where they differ
PAIRS = {
    "knorm": ("KnormPress", {}),
    "keydiff": ("KeyDiffPress", {}),
    "snapkv": ("SnapKVPress", {"window_size": 16, "kernel_size": 5}),
    "pyramidkv": ("SnapKVPress", {"window_size": 16}),
    "tova": ("TOVAPress", {}),
    "expected_attention": ("ExpectedAttentionPress", {"n_future_positions": 64, "n_sink": 4}),
    "lagkv": ("LagKVPress", {"n_sink": 4, "lag_size": 16}),
    "streaming_llm": ("StreamingLLMPress", {"n_sink": 4}),
    "observed_attention": ("ObservedAttentionPress", {}),
    "cur": ("CURPress", {"num_sinks": 4}),
    "non_causal": ("NonCausalAttnPress", {"chunk_size": 30}),
    "cap": ("CapPress", {"n_future_positions": 64}),
    "critical_kv": ("CriticalKVPress", {"first_stage_ratio": 0.5}),
}


def make_press(name, ratio):
    press, options = PAIRS[name]
    if name == "critical_kv":
        return kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio, window_size=16), **options)
    return getattr(kvpress, press)(compression_ratio=ratio, **options)


def make_spec(name):
    inner = {"scorer": {"name": "snapkv", "window_size": 16}} if name == "critical_kv" else {}
    return {"name": name, **PAIRS[name][1]} | inner


def no_token_twice():
    """Two rows of `LENGTH` ids: in the first layer the keys of equal tokens tie."""
    return torch.stack([torch.randperm(VOCABULARY - 5)[:LENGTH] + 5 for _ in range(2)])


@torch.no_grad()
def left_by_press(model, press, ids):
    """For each layer what a press leaves of a `DynamicCache`: positions `[B, H, K]`, ascending, and their values."""
    cache, full = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with press(model):
        # hooks of kvpress 0.5 look for an argument that transformers no longer passes by itself
        model(ids, **cache_argument(cache), cache_position=torch.arange(ids.shape[1]))
    model(ids, **cache_argument(full))
    left = []
    for mine, whole in zip(cache.layers, full.layers, strict=True):
        same = (mine.keys.unsqueeze(3) == whole.keys.unsqueeze(2)).all(dim=-1)  # [B, H, K, L]
        assert (same.sum(dim=-1) == 1).all()
        positions, order = same.int().argmax(dim=-1).sort(dim=-1)
        left.append((positions, mine.values.gather(2, order.unsqueeze(-1).expand_as(mine.values))))
    return left


@torch.no_grad()
def left_by_cache(model, scorer, ids, ratio, merger="drop"):
    options = {"sink_tokens": 0, "recent_tokens": 0, "compression_ratio": ratio, "budget": "uniform"}
    cache = MergingDynamicCache(model=model, scorer=scorer, merger=merger, **options)
    model(ids, **cache_argument(cache))
    cache.release(model)
    return [(layer.positions, layer.values) for layer in cache.layers]


@pytest.mark.parametrize("ratio", [1 - (kept + 0.5) / LENGTH for kept in KEPT], ids=KEPT)
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_tokens_survive(name, ratio):
    model, ids = llama("eager"), no_token_twice()
    expected = left_by_press(model, make_press(name, ratio), ids)
    left = left_by_cache(model, make_spec(name), ids, ratio)
    for mine, theirs in zip(left, expected, strict=True):
        assert torch.equal(mine[0], theirs[0])


@pytest.mark.parametrize("name", sorted(set(PAIRS) - {"pyramidkv", "observed_attention"}))
def test_a_press_is_a_scorer(name):
    model, ids, ratio = llama(), no_token_twice(), 1 - 46.5 / LENGTH
    expected = left_by_press(model, make_press(name, ratio), ids)
    left = left_by_cache(llama(), KVPressScorer(make_press(name, ratio)), ids, ratio)
    for mine, theirs in zip(left, expected, strict=True):
        assert torch.equal(mine[0], theirs[0])


@pytest.mark.parametrize("ratio", [1 - (kept + 0.5) / LENGTH for kept in KEPT], ids=KEPT)
@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("name", ["knorm", "keydiff", "snapkv"])
def test_the_same_values_are_merged(name, threshold, ratio):
    """`similarity` is `MergingPress`; the keys of layers later than the first differ in their last bits only."""
    model, ids = llama("eager"), no_token_twice()
    press = kvpress.MergingPress(make_press(name, ratio), similarity_threshold=threshold)
    merger = {"name": "similarity", "similarity_threshold": threshold}
    expected = left_by_press(model, press, ids)
    for mine, theirs in zip(left_by_cache(model, make_spec(name), ids, ratio, merger), expected, strict=True):
        assert torch.equal(mine[0], theirs[0])
        torch.testing.assert_close(mine[1], theirs[1], rtol=1e-4, atol=1e-5)


def test_what_is_no_press():
    with pytest.raises(TypeError, match="press is 'snapkv'; give a ScorerPress of kvpress"):
        KVPressScorer("snapkv")


def test_the_comparison_measures_what_our_evaluation_does():
    """The full cache, and a press that keeps the tokens that our scorer keeps, lose the same by both."""
    keeps = {"scorers": ["keydiff"], "budgets": ["uniform"], "mergers": ["drop"], "compression_ratios": [0.5]}
    asked = {"tasks": ["niah_single_1", "niah_multikey_1"], "context_length": 128, "examples": 2, "generate": False}
    config = EvaluationConfig(**keeps, **asked, sink_tokens=0, recent_tokens=0, dtype="float32")
    rates, _ = compare_kvpress.compare(config, ["KeyDiff"])
    evaluation = Evaluation(config)
    rows = Summary(evaluation.run(progress=False), evaluation.cells).rows
    for task in config.tasks:
        for ours, theirs in zip(rows([task], 128), rates.values(), strict=True):
            losses = [lost for _, lost in theirs[task]]
            assert ours.values["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3, abs=1e-4)
