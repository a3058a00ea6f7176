"""Every scorer with every budget and merger, dense and quantized: swapping one is a change of config alone."""

import functools
import itertools
import warnings

import pytest
import torch

from merging_cache import BUDGETS, MERGERS, SCORERS, MergingDynamicCache, MergingQuantizedCache, forget
from merging_cache.model import cache_argument
from models import greedy, left_padded, llama, prompt, run_by_hand, score_by_hand

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


def turn(caches, text, mask, tokens):
    """A turn of generation in a batch, then each row by hand on its own cache, fed what was generated.

    Args:
        caches: that of the batch, and one for each row.
        text, mask: `[2, L]`, the whole conversation so far.
        tokens: how many are generated.

    Returns:
        the conversation after it, and the logits `[tokens, 2, vocabulary]` of the batch and of the rows.
    """
    output = greedy(model(), {"input_ids": text, "attention_mask": mask}, tokens, **cache_argument(caches[0]))
    rows = []
    for row, cache in enumerate(caches[1:]):
        mine = output.sequences[row : row + 1, max(LENGTHS) - LENGTHS[row] :]
        end = mine.shape[1] - tokens
        rows.append(run_by_hand(model(), cache, mine[:, cache.get_seq_length() : end], mine[:, end:-1]))
    return output.sequences, torch.stack(output.logits), torch.cat(rows, dim=1)


def new_cache(quantized, **how):
    if quantized:
        return MergingQuantizedCache("fp8", model=model(), **{"residual_length": 8} | how)
    return MergingDynamicCache(model=model(), **how)


def triples():
    """A third of all scorers, budgets and mergers, chosen so that each two of them meet."""
    names = sorted(SCORERS), sorted(BUDGETS.keys() - {"auto"}), sorted(MERGERS)
    for numbers in itertools.product(*map(range, map(len, names))):
        if sum(numbers) % 3 == 0:
            yield tuple(of[number] for of, number in zip(names, numbers, strict=True))


def test_each_two_stages_meet():
    found = set(triples())
    names = [set(SCORERS), BUDGETS.keys() - {"auto"}, set(MERGERS)]
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert {(one[left], one[right]) for one in found} == set(itertools.product(names[left], names[right]))


@torch.no_grad()
@pytest.mark.parametrize(("scorer", "budget", "merger"), triples())
def test_padded_turns_equal_rows_alone(scorer, budget, merger, weights):
    """Dense and quantized, over two turns; after the first both have kept the very same tokens."""
    how, inputs, first_turns = options(scorer, budget, merger, weights), left_padded(LENGTHS), []
    for quantized in (False, True):
        forget(model())  # what dense caches have learned
        caches = [new_cache(quantized, **how) for _ in range(3)]
        text, mask = inputs["input_ids"], inputs["attention_mask"]
        for new, tokens in ((prompt(9, 2, seed=5), 3), (None, 2)):
            text, together, alone = turn(caches, text, mask, tokens)
            kind = "fp8" if quantized else "dense"
            torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-2, msg=lambda told, kind=kind: kind + told)
            if new is not None:
                slots = [(layer, layer.num_slots) for layer in caches[0].layers]
                first_turns.append(
                    [(layer.positions[:, :, :n], layer.values[:, :, :n], layer.num_merged) for layer, n in slots]
                )
                text = torch.cat([text, new], 1)
                mask = torch.cat([mask, torch.ones(2, text.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        assert any(int(layer.num_slots) < layer.seen for layer in caches[0].layers)
        for cache in caches:
            cache.release(model())
    for dense, packed in zip(*first_turns, strict=True):
        assert torch.equal(dense[0], packed[0])
        assert (packed[1] - dense[1]).norm() < 0.05 * dense[1].norm()
        assert torch.equal(dense[2], packed[2])


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "fp8"])
@pytest.mark.parametrize("budget", sorted(BUDGETS.keys() - {"auto"}))
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_beams_and_drafts(scorer, budget, quantized, weights):
    """A beam scores what its tokens score alone; drafts leave the cache of the accepted tokens fed by hand."""
    how, ids = options(scorer, budget, "similarity", weights), prompt(18).repeat(1, 2)

    def new(**more):
        return new_cache(quantized, **how | ({"residual_length": 64} if quantized else {}) | more)

    beams = greedy(model(), ids, 4, **cache_argument(new()), num_beams=2, output_logits=False, output_scores=True)
    total = score_by_hand(model(), new(), ids, beams.sequences[0, 36:])
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
