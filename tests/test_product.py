"""Every scorer with every budget and merger, dense and quantized: swapping one is a change of config alone."""

import functools
import warnings

import pytest
import torch

from merging_cache import BUDGETS, MERGERS, SCORERS, MergingDynamicCache, MergingQuantizedCache
from merging_cache.model import cache_argument
from models import greedy, left_padded, llama, prompt
from test_query_scorers import gate_weights, kvzap_weights

LENGTHS = [44, 26]
MAX_TOKENS = 16

SPECS = {
    "random": {"seed": 3},
    "snapkv": {"window_size": 8},
    "pyramidkv": {"window_size": 8},
    "non_causal": {"chunk_size": 16},
    "compactor": {"chunk_size": 16},
    "lagkv": {"lag_size": 8},
    "critical_kv": {"scorer": {"name": "snapkv", "window_size": 8}},
    "chunk_kv": {"scorer": "tova", "chunk_length": 3},
}
# where the scores of a scorer lie, so that a threshold keeps some tokens and evicts others
THRESHOLDS = {"keydiff": -0.6, "knorm": -3.5, "streaming_llm": 0.5, "lagkv": 0.5, "random": 0.5, "value_norm": 3.0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    kvzap_weights(folder / "kvzap", "mlp")
    gate_weights(folder / "fast_kvzip")
    return folder


@functools.cache
def model():
    return llama()


def options(scorer, budget, merger, weights):
    spec = {"name": scorer, **SPECS.get(scorer, {})}
    if scorer in ("kvzap", "fast_kvzip"):
        spec["weights"] = str(weights / scorer)
    budgets = {
        "per_layer": {"name": "per_layer", "weights": [1, 2]},
        "threshold": {"name": "threshold", "threshold": THRESHOLDS.get(scorer, 0.03), "window": 6},
    }
    return {
        "scorer": spec,
        "budget": budgets.get(budget, budget),
        "merger": merger,
        "max_tokens": MAX_TOKENS,
        "sink_tokens": 2,
        "recent_tokens": 4,
    }


def turns(caches, inputs):
    """Two turns of generation in a batch, then each row on its own cache; the logits of both."""
    batch_cache, row_caches = caches
    text, mask, together, alone = inputs["input_ids"], inputs["attention_mask"], [], []
    for turn in range(2):
        if turn:
            text = torch.cat([text, prompt(9, 2, seed=5)], 1)
            mask = torch.cat([mask, torch.ones(2, text.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        output = greedy(model(), {"input_ids": text, "attention_mask": mask}, 3, **cache_argument(batch_cache))
        together.append(torch.stack(output.logits))
        rows = []
        for row, length in enumerate(LENGTHS):
            mine = text[row : row + 1, max(LENGTHS) - length :]
            rows.append(torch.stack(greedy(model(), mine, 3, **cache_argument(row_caches[row])).logits))
        alone.append(torch.cat(rows, dim=1))
        text, mask = output.sequences, torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    return torch.stack(together), torch.stack(alone)


def new_cache(quantized, **how):
    if quantized:
        return MergingQuantizedCache("fp8", model=model(), **{"residual_length": 8} | how)
    return MergingDynamicCache(model=model(), **how)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "fp8"])
@pytest.mark.parametrize("merger", sorted(MERGERS))
@pytest.mark.parametrize("budget", sorted(BUDGETS))
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_padded_turns_equal_rows_alone(scorer, budget, merger, quantized, weights):
    how, inputs = options(scorer, budget, merger, weights), left_padded(LENGTHS)
    caches = [new_cache(quantized, **how) for _ in range(3)]
    together, alone = turns((caches[0], caches[1:]), inputs)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-2)
    assert any(int(layer.num_slots) < layer.seen for layer in caches[0].layers)
    for cache in caches:
        cache.release(model())


@pytest.mark.parametrize("merger", sorted(MERGERS))
@pytest.mark.parametrize("budget", sorted(BUDGETS))
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_quantized_storage_keeps_the_very_same_tokens(scorer, budget, merger, weights):
    how, inputs = options(scorer, budget, merger, weights), left_padded(LENGTHS)
    quantized, dense = new_cache(True, **how), new_cache(False, **how)
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    for cache in (quantized, dense):
        model()(**inputs, position_ids=position_ids, **cache_argument(cache))
    for mine, theirs in zip(quantized.layers, dense.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions)
        assert torch.equal(mine.num_merged, theirs.num_merged)
        assert (mine.values - theirs.values).norm() < 0.05 * theirs.values.norm()
    quantized.release(model())
    dense.release(model())


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "fp8"])
@pytest.mark.parametrize("budget", sorted(BUDGETS))
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_beams_and_drafts(scorer, budget, quantized, weights):
    """A beam scores what its tokens score alone; drafts leave the cache of the accepted tokens fed by hand."""
    how, ids = options(scorer, budget, "similarity", weights), prompt(18).repeat(1, 2)

    def new(**more):
        return new_cache(quantized, **how | ({"residual_length": 64} if quantized else {}) | more)

    beams = greedy(model(), ids, 4, **cache_argument(new()), num_beams=2, output_logits=False, output_scores=True)
    by_hand, total = new(), 0.0
    logits = model()(ids, **cache_argument(by_hand)).logits[:, -1]
    for token in beams.sequences[0, 36:]:
        total += logits.log_softmax(-1)[0, token].item()
        logits = model()(token.view(1, 1), **cache_argument(by_hand)).logits[:, -1]
    assert beams.sequences_scores[0].item() == pytest.approx(total / 4, abs=2e-3)

    drafted = new(fold_at="decode")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = greedy(model(), ids, 6, **cache_argument(drafted), prompt_lookup_num_tokens=3, output_logits=False)
    by_hand = new(fold_at="decode")
    model()(ids, **cache_argument(by_hand))
    for token in output.sequences[0, 36 : drafted.get_seq_length()]:
        model()(token.view(1, 1), **cache_argument(by_hand))
    for mine, theirs in zip(drafted.layers, by_hand.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-3, atol=2e-2 if quantized else 1e-3)
    drafted.release(model())
