"""Budgets over layers: which tokens all layers together keep, against loops, and when they fold."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import reference
from merging_cache import LayerStates, MergingDynamicCache, MergingQuantizedCache, Reading
from merging_cache.budgets import GlobalBudget
from merging_cache.layers import MergingHybridLayer
from merging_cache.model import cache_argument
from merging_cache.scorers import KnormScorer
from models import WINDOW, assert_same_cache, greedy, left_padded, llama, prompt, tiny_model

pytestmark = pytest.mark.core
KINDS = {"dynamic": MergingDynamicCache, "fp8": lambda **options: MergingQuantizedCache("fp8", **options)}


def joint(model, kind="dynamic", **options):
    """A cache whose layers fold together; key norms differ widely from layer to layer."""
    return KINDS[kind](model=model, **{"budget": "global", "scorer": "knorm", "merger": "drop"} | WINDOW | options)


def kept(cache):
    """By layer, row and head the positions of the survivors."""
    return [
        [[head[head >= 0].tolist() for head in row] for row in layer.positions[:, :, : layer.num_slots]]
        for layer in cache.folding_layers
    ]


def slots(cache):
    """By row, how many slots there are in all layers and heads."""
    return sum(layer.slots_per_head.sum(dim=1) for layer in cache.folding_layers).tolist()


def chosen_by_loops(layers, count, sinks, recent):
    """Positions by layer and head of the `count` highest scores of one row; `layers` holds scores by layer and head."""
    ranked = []
    for number, heads in enumerate(layers):
        for head, scores in enumerate(heads):
            last = len(scores) - recent
            best = reference.top_tokens(scores, 1)
            for token, score in enumerate(scores):
                stays = token < sinks or token >= last or (token in best and not sinks + recent)
                ranked.append((float("inf") if stays else score, token, number, head))
    ranked.sort(key=lambda one: one[:2], reverse=True)
    found = [[[] for _ in heads] for heads in layers]
    for _, token, number, head in ranked[:count]:
        found[number][head].append(token)
    return [[sorted(tokens) for tokens in heads] for heads in found]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 12), st.data())
def test_shares_equal_loops(heads_of_layers, length, data):
    """Scores with many ties, of which the later token wins; whose head it is among equal tokens is left open."""
    heads = sum(heads_of_layers)
    values = data.draw(st.lists(st.integers(0, 2), min_size=heads * length, max_size=heads * length))
    num_slots = data.draw(st.integers(1, length))
    scores = torch.tensor(values).float().view(1, heads, length).split(heads_of_layers, dim=1)
    positions = [torch.arange(length).expand(one.shape) for one in scores]
    found = GlobalBudget().share(scores, positions, torch.tensor([num_slots]))
    assert sum(int(one.sum()) for one in found) == num_slots * heads
    assert all(one.any(dim=-1).all() for one in found)  # every head keeps a token
    expected = chosen_by_loops([one[0].tolist() for one in scores], num_slots * heads, 0, 0)

    def ranks(kept):  # scores and positions of the survivors, the best of each head apart
        best = [reference.top_tokens(head, 1)[0] for one in scores for head in one[0].tolist()]
        flat = [head for layer in kept for head in layer]
        all_scores = [head for one in scores for head in one[0].tolist()]
        others = [(all_scores[h][t], t) for h, tokens in enumerate(flat) for t in tokens if t != best[h]]
        return sorted(others)

    mine = [[head.nonzero().squeeze(1).tolist() for head in one[0]] for one in found]
    assert ranks(mine) == ranks(expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", *(["qwen3_next"] if MergingHybridLayer else [])])
@torch.no_grad()
def test_all_layers_keep_the_highest_scores_of_all(family, kind):
    """Hybrid models, too: layers of other kinds have no part in it."""
    model, ids = llama() if family == "llama" else tiny_model(family), prompt(90)
    full = DynamicCache(config=model.config)
    model(ids, **cache_argument(full))
    cache = joint(model, kind, compression_ratio=0.75)
    model(ids, **cache_argument(cache))
    folding = [layer.layer_idx for layer in cache.folding_layers]
    scores = [KnormScorer().score(LayerStates(full.layers[i].keys, full.layers[i].values))[0] for i in folding]
    heads = sum(map(len, scores))
    expected = chosen_by_loops([one.tolist() for one in scores], 22 * heads, 2, 6)
    assert [row for (row,) in kept(cache)] == expected
    assert slots(cache) == [22 * heads]
    assert len(folding) == 1 or len({len(head) for layer in expected for head in layer}) > 1


@pytest.mark.parametrize("size", [{"compression_ratio": 0.6}, {"max_tokens": 14}], ids=str)
@torch.no_grad()
def test_each_row_has_its_own_budget(size):
    """A ratio is of the row's own tokens, so that padding changes nothing."""
    model, lengths = llama(), [60, 41, 12]
    inputs = left_padded(lengths)
    together = greedy(model, inputs, **cache_argument(joint(model, merger="auto", **size)))
    cache = joint(model, merger="auto", **size)
    model(**inputs, **cache_argument(cache))
    for row, length in enumerate(lengths):
        alone = joint(model, merger="auto", **size)
        ids = inputs["input_ids"][row : row + 1, -length:]
        model(ids, **cache_argument(alone))
        stored = [sum(layer.stored_per_head.sum(dim=1) for layer in one.layers) for one in (cache, alone)]
        assert stored[0][row] == stored[1][0]
        logits = greedy(model, ids, **cache_argument(joint(model, merger="auto", **size))).logits
        for mine, theirs in zip(together.logits, logits, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_holds_the_whole_prompt_until_the_last_layer_was_scored(monkeypatch):
    model, held = llama(layers=3), []
    cache = joint(model, compression_ratio=0.5)
    model_layers = model.model.layers
    for layer in model_layers:
        layer.register_forward_hook(lambda *_: held.append([one.num_stored for one in cache.layers]))
    model(prompt(40), **cache_argument(cache))
    assert held[:2] == [[40, 0, 0], [40, 40, 0]]
    assert slots(cache) == [20 * 6]
    assert not any(layer.fold_is_due or layer.scored for layer in cache.layers)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_chunks_and_turns(kind):
    model, ids = llama(), prompt(96)
    streamed = joint(model, kind, compression_ratio=0.5)
    for seen, piece in zip((32, 64, 96), ids.split(32, dim=1), strict=True):
        model(piece, **cache_argument(streamed))
        assert slots(streamed) == [seen // 2 * 4]
    pieces, whole = (joint(model, kind, compression_ratio=0.5, fold_at="decode") for _ in range(2))
    for piece in ids.split(32, dim=1):
        model(piece, **cache_argument(pieces))
        assert pieces.layers[0].num_slots == 0
    model(ids, **cache_argument(whole))
    for cache in (pieces, whole):
        model(prompt(1), **cache_argument(cache))
        assert slots(cache) == [48 * 4]
    for mine, theirs in zip(pieces.layers, whole.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions)
    asked = joint(model, kind, compression_ratio=0.5, fold_at="decode")
    model(ids, **cache_argument(asked))
    assert kept(asked.fold()) == kept(whole)


@torch.no_grad()
def test_copies_fold_with_their_own_kind():
    """A cache that is copied, pickled or gone leaves nothing behind in another."""
    model, ids = llama(), prompt(50)
    cache = joint(model, fold_at="decode", compression_ratio=0.5)
    model(ids, **cache_argument(cache))
    twin, thawed = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    for one in (twin, thawed):
        assert len(one._shared.joint.members) == len(cache._shared.joint.members) == 2
        one.fold()
        assert slots(one) == [25 * 4]
        assert cache.layers[0].num_slots == 0
    cache.fold()
    assert_same_cache(twin, cache)
    assert kept(thawed) == kept(cache)
    members = [weakref.ref(layer) for layer in twin.layers]
    twin.release()
    del twin, one
    gc.collect()
    assert not any(ref() for ref in members)
    cache.reset()
    model(ids, **cache_argument(cache))
    assert slots(cache.fold()) == [25 * 4]


@torch.no_grad()
def test_a_reading_fills_it_as_a_prefill_does():
    model, ids = llama(), prompt(70)
    whole = joint(model, merger="auto", compression_ratio=0.75)
    model(ids, **cache_argument(whole))
    assert_same_cache(Reading(model, ids).fill(joint(model, merger="auto", compression_ratio=0.75)), whole)


@torch.no_grad()
def test_it_needs_the_model():
    model = llama()
    cache = MergingDynamicCache(config=model.config, budget="global", compression_ratio=0.5, **WINDOW)
    model(prompt(40), **cache_argument(cache))
    with pytest.raises(ValueError, match="model=model"):
        model(prompt(1), **cache_argument(cache))
