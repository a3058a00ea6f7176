"""Every scorer against its formula written out with loops."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as apply

import reference
from merging_cache import SCORERS, LayerStates
from merging_cache.model import Rotary
from merging_cache.scorers import (
    CURScorer,
    KVzipScorer,
    LagKVScorer,
    LeaveOneOutScorer,
    RandomScorer,
    SnapKVScorer,
    StreamingLLMScorer,
    TOVAScorer,
)
from merging_cache.scorers.attention import attention_tiles
from merging_cache.states import Again, Projected

pytestmark = pytest.mark.core

FORMULAS = {
    "knorm": ({}, reference.knorm),
    "value_norm": ({}, reference.value_norm),
    "keydiff": ({}, reference.keydiff),
    "streaming_llm": ({}, reference.streaming_llm),
    "lagkv": ({"n_sink": 3, "lag_size": 8}, partial(reference.lagkv, n_sink=3, lag_size=8)),
    "cur": ({}, reference.cur),
}


# learned ones need weights and hidden states, see test_query_scorers.py
UNLEARNED = sorted(set(SCORERS) - {"kvzap", "fast_kvzip"})


class Attention(torch.nn.Module):
    """What critical_kv looks for in an attention module."""

    def __init__(self, heads, dim):
        super().__init__()
        self.o_proj = torch.nn.Linear(heads * dim, 8)


def random_states(length, batch=2, heads=3, dim=6, dtype=torch.float32, module=Attention):
    """Keys and values, the queries of two heads for each KV head, and all else a scorer may ask for."""
    keys, values = torch.randn(batch, heads, length, dim).to(dtype), torch.randn(batch, heads, length, dim).to(dtype)
    queries = torch.randn(batch, 2 * heads, length, dim).to(dtype)
    rotary = Rotary(LlamaRotaryEmbedding(LlamaConfig(head_dim=dim)), {}, lambda x, cos, sin: apply(x, x, cos, sin)[0])
    weights, outputs = torch.rand(batch, heads, 2, 5, length).to(dtype), torch.randn(batch, heads, 2, 5, dim).to(dtype)
    states = LayerStates(
        keys,
        values,
        queries=queries,
        query_positions=torch.arange(length),
        again=Again(weights, torch.rand(batch, 5) + 0.5, outputs, torch.rand(batch, 5) + 0.5),
        module=module(2 * heads, dim),
        rotary=rotary,
        layer_idx=0,
    )
    return seen_again(states)


def seen_again(states, **again):
    """With something else of what was read again, as it is seen through the output projection."""
    return replace(states, again=replace(states.again, **again, projected=Projected.of(states)))


def score(scorer, states):
    """Observe all tokens in one pass, or that they are read again, then score."""
    if scorer.reads_again:
        observed = states.statistics if states.again is None else scorer.observe_again(states)
    else:
        observed = scorer.observe(states, states.num_tokens)
    return scorer.score(replace(states, statistics=observed))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("length", [1, 2, 5, 18, 19, 37, 64])
def test_equals_formula(name, length):
    options, formula = FORMULAS[name]
    states = random_states(length)
    expected = reference.per_head(states, formula)
    torch.testing.assert_close(SCORERS[name](**options).score(states), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNLEARNED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_fp32(name, dtype):
    states = random_states(40, dtype=dtype)
    scorer = SCORERS[name](**({"seed": 3} if name == "random" else {}))
    wide = {name: getattr(states, name).float() for name in ("keys", "values", "queries")}
    again = {name: getattr(states.again, name).float() for name in ("weights", "outputs")}
    wide = seen_again(replace(states, **wide), **again)
    narrow = score(scorer, states)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, score(scorer, wide))


@pytest.mark.parametrize("name", UNLEARNED)
def test_rows_do_not_see_each_other(name):
    states = random_states(300)
    scorer = SCORERS[name](**({"seed": 3} if name == "random" else {}))
    first = states.select(torch.tensor([0]), torch.arange(300))
    again = {name: getattr(states.again, name)[:1] for name in ("weights", "norms", "outputs", "lengths")}
    first = seen_again(first, **again)
    torch.testing.assert_close(score(scorer, states)[:1], score(scorer, first), rtol=1e-4, atol=1e-5)


TOGETHER = {"tova", "chunk_kv", "leverage", "compactor", "non_causal"}  # a head's scores depend on the others'


@pytest.mark.parametrize("name", sorted(set(UNLEARNED) - TOGETHER))
def test_a_head_apart_scores_as_it_does_among_the_others(name):
    """Which weights and which random numbers are whose, once heads store different numbers of tokens."""
    states = random_states(40)
    options = {"random": {"seed": 3}, "critical_kv": {"first_stage_ratio": 0.0}}
    scorer = SCORERS[name](**options.get(name, {}))
    whole = score(scorer, states)
    if scorer.reads_again:  # which is seen of all heads at once
        states = replace(states, again=None, statistics=scorer.observe_again(states))
    apart = torch.tensor([[5, 6, 7], [5, 6, 7]])  # heads that keep different numbers are handed over one by one
    for row, heads, _, part in states.rectangles(apart):
        assert part.keys.shape[1] == 1
        torch.testing.assert_close(score(scorer, part), whole[row, heads], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "window", "kernel"), [(30, 6, 5), (30, 1, 1), (9, 8, 3), (8, 8, 3), (5, 64, 5), (1, 4, 5)]
)
def test_snapkv_equals_formula(length, window, kernel):
    states = random_states(length)
    expected = reference.snapkv(states, window, kernel)
    torch.testing.assert_close(SnapKVScorer(window, kernel).score(states), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 30])
def test_tova_equals_formula(length):
    states = random_states(length)
    torch.testing.assert_close(TOVAScorer().score(states), reference.tova(states), rtol=1e-4, atol=1e-6)


def test_attention_tiles_do_not_depend_on_their_size(monkeypatch):
    states = random_states(40)
    whole = torch.cat([weights for _, weights in attention_tiles(states)], dim=3)
    monkeypatch.setattr("merging_cache.scorers.attention.TILE", 1)
    tiles = [weights for _, weights in attention_tiles(states)]
    assert len(tiles) == 40
    torch.testing.assert_close(torch.cat(tiles, dim=3), whole)
    assert torch.equal(whole.sum(-1).round(decimals=4), torch.ones(2, 3, 2, 40))


READING_AGAIN = {
    "kvzip": (KVzipScorer(), partial(reference.kvzip, plus=False)),
    "kvzip plus": (KVzipScorer(plus=True), partial(reference.kvzip, plus=True)),
    "leave_one_out": (LeaveOneOutScorer(), reference.leave_one_out),
}


@pytest.mark.parametrize("name", READING_AGAIN)
def test_what_is_read_again_equals_loops_whatever_is_shown_at_a_time(name):
    states, (scorer, formula) = random_states(13), READING_AGAIN[name]
    weights, norms, outputs, lengths = (getattr(states.again, of) for of in ("weights", "norms", "outputs", "lengths"))
    expected = formula(states)
    torch.testing.assert_close(score(scorer, states), expected, rtol=1e-4, atol=1e-6)
    for one in range(5):
        part = slice(one, one + 1)
        again = Again(weights[:, :, :, part], norms[:, part], outputs[:, :, :, part], lengths[:, part])
        again = replace(again, projected=states.again.projected)
        states = replace(states, statistics=scorer.observe_again(replace(states, again=again)))
    torch.testing.assert_close(scorer.score(states), expected, rtol=1e-4, atol=1e-6)


class Quantized(Attention):
    """An attention module whose output projection cannot be read."""

    def __init__(self, heads, dim):
        super().__init__(heads, dim)
        self.o_proj.weight = torch.nn.Parameter(self.o_proj.weight.mul(99).to(torch.int8), requires_grad=False)


def test_heads_are_seen_as_they_are_where_the_output_projection_cannot_be_read():
    states = random_states(13, module=Quantized)
    expected = reference.leave_one_out(states, torch.eye(36))
    torch.testing.assert_close(score(LeaveOneOutScorer(), states), expected, rtol=1e-4, atol=1e-6)
    outputs = states.again.outputs
    whole = outputs.movedim(3, 1).flatten(2).norm(dim=-1)  # of all heads side by side
    torch.testing.assert_close(states.again.projected.lengths(outputs, lambda one: one), whole)


def test_random_is_reproducible_and_differs_between_layers():
    states = random_states(20)
    other = LayerStates(states.keys, states.values, layer_idx=1)
    scorer = RandomScorer(seed=1)
    assert torch.equal(scorer.score(states), scorer.score(states))
    assert not torch.equal(scorer.score(states), scorer.score(other))
    assert not torch.equal(scorer.score(states), RandomScorer(seed=2).score(states))
    assert not torch.equal(RandomScorer().score(states), RandomScorer().score(states))


def test_lagkv_cross_block_keeps_the_softmax():
    states = random_states(3 + 4 * 8)
    scores = LagKVScorer(n_sink=3, lag_size=8, cross_block=True).score(states)
    torch.testing.assert_close(scores[:, :, 3:27].unflatten(2, (3, 8)).sum(-1), torch.ones(2, 3, 3))


def test_lagkv_survives_constant_channels():
    states = LayerStates(torch.ones(1, 1, 20, 4), torch.zeros(1, 1, 20, 4))
    assert LagKVScorer(n_sink=0, lag_size=5).score(states).isfinite().all()


@pytest.mark.parametrize("leverage", ["kv_avg", "key", "value", "kv_product"])
def test_cur_variants(leverage):
    states = random_states(30)
    k, v = states.keys.square().sum(-1), states.values.square().sum(-1)
    expected = {"kv_avg": (k + v) / 2, "key": k, "value": v, "kv_product": k * v}[leverage]
    expected = expected / expected.sum(-1, keepdim=True)
    expected[..., :4] = 1
    torch.testing.assert_close(CURScorer(leverage=leverage, use_local_approximation=False).score(states), expected)


def test_cur_random_projection_is_seeded():
    states = random_states(30)
    scorer = CURScorer(use_random_projection=True)
    assert torch.equal(scorer.score(states), scorer.score(states))
    assert not torch.equal(scorer.score(states), CURScorer(use_random_projection=True, seed=1).score(states))


@pytest.mark.parametrize(
    ("scorer", "options", "message"),
    [
        (StreamingLLMScorer, {"n_sink": -1}, "n_sink is -1"),
        (LagKVScorer, {"lag_size": 0}, "lag_size is 0"),
        (CURScorer, {"leverage": "both"}, "leverage is 'both'; choose one of"),
        (CURScorer, {"local_window_size": 0}, "local_window_size is 0"),
        (SnapKVScorer, {"window_size": 0}, "window_size is 0"),
        (SnapKVScorer, {"kernel_size": 4}, "kernel_size is 4; it must be odd"),
    ],
)
def test_bad_options(scorer, options, message):
    with pytest.raises(ValueError, match=message):
        scorer(**options)
