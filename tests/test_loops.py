"""Models that run their layers in loops and copy some onto the end of the cache; copies of layers and of caches."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from merging_cache import MergingDynamicCache
from merging_cache.model import cache_argument
from models import (
    CACHES,
    WINDOW,
    SameInAllHeads,
    greedy,
    left_padded,
    llama,
    prompt,
    run_by_hand,
    score_by_hand,
    tiny_config,
    tiny_model,
)

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore")]

LENGTH = 40
loops = pytest.mark.skipif("dory" not in CONFIG_MAPPING, reason="transformers before 5.24 has no such model")
kinds = pytest.mark.parametrize("kind", ["dynamic", "fp8"])


def test_a_layer_copied_alone_stays_its_caches():
    model = llama()
    cache = MergingDynamicCache(config=model.config, **WINDOW)
    model(prompt(LENGTH), **cache_argument(cache))
    layer = copy.deepcopy(cache.layers[1])
    assert layer._shared is cache.layers[0]._shared
    before = cache.layers[1].keys.clone()
    layer.update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16))
    assert torch.equal(cache.layers[1].keys, before)
    assert cache.layers[1].seen == LENGTH


def test_a_cache_copied_whole_has_a_batch_of_its_own():
    model, inputs = llama(), left_padded([20, 30])
    cache = MergingDynamicCache(config=model.config, attention_mask=inputs["attention_mask"], **WINDOW)
    twin = copy.deepcopy(cache)
    assert all(layer._shared is twin.layers[0]._shared for layer in twin.layers)
    assert twin.layers[0]._shared is not cache.layers[0]._shared
    twin.attention_mask = None
    assert cache.attention_mask is not None
    lazy = copy.deepcopy(MergingDynamicCache(compression_ratio=0.5))
    model(prompt(LENGTH), **cache_argument(lazy))  # its layers are made by the copy itself
    assert len(lazy.layers) == 2


def test_a_layer_and_its_cache_copied_together_belong_together():
    cache = MergingDynamicCache(config=llama().config, **WINDOW)
    layer, twin = copy.deepcopy([cache.layers[0], cache])
    assert layer is twin.layers[0]
    assert len({id(one._shared) for one in twin.layers} | {id(one.guards.shared) for one in twin.layers}) == 1
    assert twin.layers[0]._shared is not cache.layers[0]._shared


def dory(mode="per_loop"):
    """Two layers, one with a sliding window, that are run twice."""
    config = tiny_config("dory")
    config.recurrent_kv_cache_mode = mode
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()


@loops
@kinds
def test_every_loop_folds_its_own_copy(kind):
    model, ids = dory(), prompt(LENGTH)
    full = greedy(model, ids, **cache_argument(DynamicCache(config=model.config)))
    if kind == "dynamic":
        same = greedy(model, ids, **cache_argument(CACHES[kind](model, compression_ratio=0)))
        assert torch.equal(torch.stack(full.logits), torch.stack(same.logits))
    cache = CACHES[kind](model, compression_ratio=0.5)
    output = greedy(model, ids, **cache_argument(cache))
    assert [layer.num_slots for layer in cache.folding_layers] == [LENGTH // 2] * 2
    assert len(cache.report().layers) == 4
    logits = run_by_hand(model, CACHES[kind](model, compression_ratio=0.5), ids, output.sequences[:, LENGTH:-1])
    torch.testing.assert_close(torch.stack(output.logits), logits, rtol=1e-4, atol=1e-4)


@loops
def test_loops_of_hybrid_layers_at_ratio_zero():
    """Inkling 2's looped layers hold a linear-attention state, too; its position bias allows no fold."""
    model, ids = tiny_model("inkling2_loop_text", attention="eager"), prompt(LENGTH)
    full = greedy(model, ids, **cache_argument(DynamicCache(config=model.config)))
    cache = CACHES["dynamic"](model, compression_ratio=0)
    for _ in range(2):
        same = greedy(model, ids, **cache_argument(cache))
        assert torch.equal(torch.stack(full.logits), torch.stack(same.logits))
        assert len(cache.folding_layers) == 3
        cache.reset()
    with pytest.raises(ValueError, match="position bias"):
        MergingDynamicCache(config=model.config)


@loops
def test_loops_are_released_and_reset_with_their_cache():
    model = dory()
    cache = MergingDynamicCache(model=model, merger="mass", budget="adakv", **WINDOW)
    first = greedy(model, prompt(LENGTH), **cache_argument(cache))
    assert model.config._attn_implementation == "merging_sdpa"
    cache.reset()
    greedy(model, left_padded([30, 20]), **cache_argument(cache))  # another batch, and padded
    cache.reset()
    again = greedy(model, prompt(LENGTH), **cache_argument(cache))
    assert torch.equal(torch.stack(first.logits), torch.stack(again.logits))
    cache.release()
    assert model.config._attn_implementation == "sdpa"


@loops
@torch.no_grad()
@pytest.mark.parametrize("told", ["before", "after the first pass", "by the link"])
def test_padding_reaches_every_loop(told):
    model, lengths = dory(), [30, 22]
    inputs = left_padded(lengths)
    options = {"scorer": "keydiff", "budget": "uniform", "merger": "similarity", "fold_at": "decode"}
    options |= {"max_tokens": 12} | WINDOW
    named = {"model": model} if told == "by the link" else {"config": model.config}
    cache = MergingDynamicCache(**named, **options)
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    if told == "before":
        cache.attention_mask = inputs["attention_mask"]
    model(**inputs, position_ids=position_ids, **cache_argument(cache))
    if told == "after the first pass":
        cache.attention_mask = inputs["attention_mask"]
    more = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    token, position = torch.tensor([[7], [8]]), position_ids[:, -1:] + 1
    together = model(token, attention_mask=more, position_ids=position, **cache_argument(cache)).logits
    cache.release()
    for row, length in enumerate(lengths):
        alone = MergingDynamicCache(config=model.config, **options)
        model(inputs["input_ids"][row : row + 1, -length:], **cache_argument(alone))
        step = model(token[row : row + 1], **cache_argument(alone)).logits
        torch.testing.assert_close(together[row : row + 1], step, rtol=1e-4, atol=1e-4)
    kept = copy.deepcopy(cache)
    kept.batch_select_indices(torch.tensor([1]))
    step = model(token[1:], attention_mask=torch.cat([more[1:], more[1:, :1] * 0 + 1], 1), **cache_argument(kept))
    both = model(token, attention_mask=torch.cat([more, more[:, :1] * 0 + 1], 1), **cache_argument(cache))
    torch.testing.assert_close(step.logits, both.logits[1:], rtol=1e-4, atol=1e-4)


@loops
@torch.no_grad()
def test_loops_that_read_stored_keys_by_themselves():
    """Dory's `last_loop`: the first loop reads what the last one stored."""
    model, ids = dory("last_loop"), prompt(LENGTH + 1)
    cache = MergingDynamicCache(model=model, scorer=SameInAllHeads(), merger="drop", recent_tokens=16)
    full = DynamicCache(config=model.config)
    for one in (cache, full):
        model(ids[:, :-1], **cache_argument(one))
    kept = cache.folding_layers[0].positions[0, 0]
    mask = torch.ones(1, LENGTH + 1, dtype=torch.long)
    mask[0, [position for position in range(LENGTH) if position not in kept]] = 0
    step = model(ids[:, -1:], **cache_argument(cache)).logits
    masked = model(ids[:, -1:], attention_mask=mask, **cache_argument(full)).logits
    torch.testing.assert_close(step, masked, rtol=1e-4, atol=1e-5)
    cache.release()
    with pytest.raises(ValueError, match="reads stored keys by itself"):
        cache.fixed(4)
    default = MergingDynamicCache(model=model)
    assert default.folding_layers[0].merger.stage_name == "DropMerger"
    default.release()


@loops
@pytest.mark.parametrize("how", [{"merger": "mass"}, {"budget": "adakv"}, {"fold_at": "decode"}], ids=str)
def test_what_such_loops_cannot_read_is_refused(how):
    model = dory("last_loop")
    with pytest.raises(ValueError, match="last_loop.* reads the stored keys"):
        MergingDynamicCache(model=model, **how)
    assert model.config._attn_implementation == "sdpa"


@loops
@kinds
def test_beams_reorder_every_loop(kind):
    model, ids = dory(), prompt(LENGTH)
    cache = CACHES[kind](model, compression_ratio=0.5)
    beams = greedy(model, ids, 4, num_beams=2, output_logits=False, output_scores=True, **cache_argument(cache))
    total = score_by_hand(model, CACHES[kind](model, compression_ratio=0.5), ids, beams.sequences[0, LENGTH:])
    assert beams.sequences_scores[0].item() == pytest.approx(total / 4, abs=2e-3)
