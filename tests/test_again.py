"""Scorers that have the model read the prompt again: against attention weights of an ordinary second pass."""

import pytest
import torch
from transformers import DynamicCache

from merging_cache import MergingDynamicCache, MergingQuantizedCache, Reading
from merging_cache.model import cache_argument
from models import WINDOW, assert_same_cache, greedy, left_padded, llama, prompt, tiny_model

pytestmark = pytest.mark.core
KINDS = {"dynamic": MergingDynamicCache, "fp8": lambda **options: MergingQuantizedCache("fp8", **options)}


def kvzip(model, kind="dynamic", chunk_size=2048, **options):
    scorer = {"name": "kvzip", "chunk_size": chunk_size}
    return KINDS[kind](model=model, **{"scorer": scorer, "merger": "drop"} | WINDOW | options)


@torch.no_grad()
def by_attention(model, ids, chunk_size):
    """By layer `[H, L]`: the largest weight on each token of an eager model that reads the ids again, in chunks."""
    length, best = ids.shape[1], None
    for piece in ids.split(chunk_size, dim=1):
        cache = DynamicCache(config=model.config)
        model(ids, **cache_argument(cache))
        found = model(piece, **cache_argument(cache), output_attentions=True).attentions
        weights = [one[0, :, :, :length].amax(dim=1) for one in found]  # [Hq, L]
        best = weights if best is None else [torch.maximum(*pair) for pair in zip(best, weights, strict=True)]
    heads = cache.layers[0].keys.shape[1]
    return [one.unflatten(0, (heads, -1)).amax(dim=1) for one in best]


@pytest.mark.parametrize("chunk_size", [2048, 25])
@torch.no_grad()
def test_scores_are_the_largest_attention_of_a_second_pass(chunk_size):
    model, ids = llama("eager"), prompt(60)
    expected = by_attention(model, ids, chunk_size)
    before = model(ids, **cache_argument(DynamicCache(config=model.config))).logits
    shown = []
    cache = kvzip(model, chunk_size=chunk_size, compression_ratio=0.5, budget="uniform")
    score = type(cache._shared.fold.scorer).score
    cache._shared.fold.scorer.score = lambda states: shown.append(score(cache._shared.fold.scorer, states)) or shown[-1]
    output = model(ids, **cache_argument(cache))
    assert torch.equal(output.logits, before)
    assert cache.get_seq_length() == 60
    assert [layer.num_slots for layer in cache.layers] == [30, 30]
    for mine, theirs in zip(shown, expected, strict=True):
        torch.testing.assert_close(mine[0], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", ["uniform", "adakv", "global"])
@pytest.mark.parametrize("chunk_size", [2048, 16])
def test_padded_rows_equal_the_row_alone(budget, chunk_size):
    model, lengths = llama(), [50, 31, 12]
    inputs = left_padded(lengths)
    options = {"budget": budget, "chunk_size": chunk_size, "max_tokens": 14}
    together = greedy(model, inputs, **cache_argument(kvzip(model, **options)))
    for row, length in enumerate(lengths):
        ids = inputs["input_ids"][row : row + 1, -length:]
        alone = greedy(model, ids, **cache_argument(kvzip(model, **options)))
        for mine, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_late_folds_embeddings_and_readings_give_the_same(kind):
    model, ids = llama(), prompt(60)
    options = {"merger": "auto", "compression_ratio": 0.75}
    expected = kvzip(model, kind, **options)
    model(ids, **cache_argument(expected))
    late = kvzip(model, kind, fold_at="decode", **options)
    for piece in ids.split(23, dim=1):
        model(piece, **cache_argument(late))
    assert late.layers[0].num_slots == 0
    late.fold()
    embedded = kvzip(model, kind, **options)
    model(inputs_embeds=model.get_input_embeddings()(ids), **cache_argument(embedded))
    filled = Reading(model, ids).fill(kvzip(model, kind, **options))
    for cache, tolerance in ((late, 1e-4), (embedded, 0), (filled, 0)):
        for mine, theirs in zip(cache.layers, expected.layers, strict=True):
            assert torch.equal(mine.positions, theirs.positions)
        if kind == "dynamic":
            assert_same_cache(cache, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "gpt2", "phi3", "mixtral", "falcon_h1"])
def test_other_architectures(family):
    model, ids = tiny_model(family), prompt(60)
    cache = kvzip(model, compression_ratio=0.5)
    plain = greedy(model, ids, new_tokens=1, **cache_argument(DynamicCache(config=model.config)))
    output = greedy(model, ids, new_tokens=4, **cache_argument(cache))
    assert torch.equal(output.logits[0], plain.logits[0])
    heads = [layer.shape.heads for layer in cache.folding_layers]
    assert sum(int(layer.slots_per_head.sum()) for layer in cache.folding_layers) == 30 * sum(heads)


def test_turns_beams_and_drafts():
    model, ids = llama(), prompt(20).repeat(1, 3)
    cache = kvzip(model, compression_ratio=0.5)
    first = greedy(model, ids, **cache_argument(cache)).sequences
    second = torch.cat([first, prompt(30, seed=3)], dim=1)
    greedy(model, second, **cache_argument(cache))
    seen = second.shape[1]
    assert sum(int(layer.slots_per_head.sum()) for layer in cache.layers) == seen // 2 * 4
    beams = greedy(model, ids, **cache_argument(kvzip(model)), num_beams=3, output_logits=False, output_scores=True)
    assert beams.sequences.shape == (1, 68)
    drafted, plain = kvzip(model, fold_at="decode"), kvzip(model, fold_at="decode")
    greedy(model, ids, **cache_argument(drafted), prompt_lookup_num_tokens=3, output_logits=False)
    greedy(model, ids, **cache_argument(plain))
    assert drafted.layers[0].num_slots
