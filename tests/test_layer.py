"""One layer by hand: geometry, growth, crop, batch operations, guards."""

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from merging_cache import MergingDynamicCache, MergingQuantizedCache
from merging_cache.storage import DenseStorage

pytestmark = pytest.mark.core

LAST = {"scorer": lambda states: states.positions.float(), "sink_tokens": 0, "recent_tokens": 0}


def coded(start, length, batch=1, heads=2, dim=4):
    """Keys and values that hold their position."""
    positions = torch.arange(start, start + length, dtype=torch.float32).view(1, 1, length, 1)
    return positions.expand(batch, heads, length, dim) + 0.25, positions.expand(batch, heads, length, dim).clone()


def feed(cache, start, length, **kwargs):
    return cache.update(*coded(start, length, **kwargs), 0)


def test_geometry_after_a_fold():
    cache = MergingDynamicCache(compression_ratio=0.5, merger="drop", **LAST)
    keys, _ = feed(cache, 0, 20)
    layer = cache.layers[0]
    assert keys.shape[2] == 20  # the prompt attends to itself in full
    assert layer.keys.shape == (1, 2, 10, 4)
    assert layer.positions[0, 0].tolist() == list(range(10, 20))
    assert layer.values[0, 0, :, 0].tolist() == list(range(10, 20))
    assert cache.get_seq_length() == layer.seen == 20
    assert cache.get_mask_sizes(1, 0) == (11, 10)
    assert cache.get_mask_sizes(7, 0) == (17, 10)
    assert layer.num_dropped.tolist() == [[10, 10]]
    assert layer.log_mass is None
    feed(cache, 20, 1)
    assert layer.positions[0, 1].tolist() == list(range(10, 21))
    assert cache.get_mask_sizes(1, 0) == (12, 10)


def test_a_ratio_counts_what_was_seen_over_several_folds():
    cache = MergingDynamicCache(compression_ratio=0.5, merger="drop", **LAST)
    for start, length, stored in [(0, 20, 10), (20, 1, 11), (21, 1, 12), (22, 18, 20), (40, 3, 21)]:
        feed(cache, start, length)
        assert cache.layers[0].num_stored == stored
    layer = cache.layers[0]
    assert layer.positions[0, 0].tolist() == layer.values[0, 0, :, 0].tolist() == list(range(22, 43))
    assert (layer.num_dropped + layer.num_merged + layer.num_stored == layer.seen).all()


def test_stored_tensors_own_their_memory():
    cache = MergingDynamicCache(compression_ratio=0.5, recent_tokens=2)
    keys, values = coded(0, 64)
    cache.update(keys, values, 0)
    storage = cache.layers[0].storage
    for tensor in (storage._keys, storage._values):
        assert tensor.untyped_storage().nbytes() == 1 * 2 * 32 * 4 * 4
    before = cache.layers[0].values.clone()
    values.zero_()
    assert torch.equal(cache.layers[0].values, before)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_growing_equals_concatenation(lengths):
    storage, pieces = DenseStorage(), []
    for length in lengths:
        new = torch.randn(2, 1, length, 3)
        storage.append(new, -new)
        pieces.append(new)
        keys, values = storage.read()
        assert torch.equal(keys, torch.cat(pieces, 2))
        assert torch.equal(values, -keys)
    assert storage.nbytes <= 2 * 2 * 3 * 4 * (storage.length + storage.length // 16)  # never more room than that


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore")
def test_another_precision_in_a_later_pass_is_promoted(first, ratio):
    """As `torch.cat` in `DynamicCache` does, say for a prefill under autocast and steps without."""
    second = torch.float32 if first == torch.bfloat16 else torch.bfloat16
    cache, full = MergingDynamicCache(compression_ratio=ratio, merger="drop", **LAST), DynamicCache()
    pieces = [torch.randn(1, 2, 24, 4, dtype=first), torch.randn(1, 2, 1, 4, dtype=second)]
    with torch.no_grad():
        for one in (cache, full):
            for piece in pieces:
                keys, values = one.update(piece, -piece, 0)
                assert torch.equal(keys, -values)
    assert cache.layers[0].keys.dtype == full.layers[0].keys.dtype == torch.float32
    if ratio == 0:
        assert torch.equal(cache.layers[0].keys, full.layers[0].keys)
    assert cache.report().total.bytes_full == full.layers[0].keys.nbytes + full.layers[0].values.nbytes


@torch.no_grad()
def test_appending_does_not_copy_the_cache():
    cache = MergingDynamicCache(max_tokens=100, **LAST)
    feed(cache, 0, 200)
    buffers = []
    for position in range(200, 500):
        feed(cache, position, 1)
        buffers.append(cache.layers[0].storage._keys)
    copies = sum(one is not other for one, other in itertools.pairwise(buffers))
    assert 1.0625**copies <= 4.0  # from 100 tokens to 400, each time a sixteenth more


def test_appending_keeps_gradients():
    first, second = (torch.randn(1, 2, n, 4, requires_grad=True) for n in (5, 1))

    def gradient(cache):
        cache.update(first, first * 2, 0)
        keys, values = cache.update(second, second * 2, 0)
        return torch.autograd.grad((keys * values).sum(), (first, second))

    torch.testing.assert_close(gradient(MergingDynamicCache(compression_ratio=0)), gradient(DynamicCache()))


def test_gradients_of_queries_alone():
    """A query that saved the keys for its gradient must find them as they were."""
    query = torch.randn(4, requires_grad=True)

    def gradient(cache):
        loss = 0
        for seed in range(4):
            torch.manual_seed(seed)
            new = torch.randn(1, 1, 3 if seed == 0 else 1, 4)
            keys, _ = cache.update(new, new, 0)
            loss = loss + (keys @ query).logsumexp(-1).sum()
        return torch.autograd.grad(loss, query)

    torch.testing.assert_close(gradient(MergingDynamicCache(compression_ratio=0)), gradient(DynamicCache()))


def test_inference_mode_then_not():
    cache = MergingDynamicCache(compression_ratio=0.5, **LAST)
    with torch.inference_mode():
        feed(cache, 0, 20)
        feed(cache, 20, 1)
    feed(cache, 21, 1)
    assert cache.layers[0].positions[0, 0].tolist() == list(range(10, 22))


def test_decode_folds_before_the_first_single_token():
    cache = MergingDynamicCache(compression_ratio=0.5, fold_at="decode", merger="drop", **LAST)
    feed(cache, 0, 12)
    feed(cache, 12, 8)
    assert cache.layers[0].num_stored == 20
    assert cache.get_mask_sizes(4, 0) == (24, 0)
    assert cache.get_mask_sizes(1, 0) == (11, 10)  # foretold, before the fold happens
    keys, _ = feed(cache, 20, 1)
    assert keys.shape[2] == 11
    assert cache.layers[0].positions[0, 0].tolist() == list(range(10, 21))
    for position in range(21, 30):
        assert feed(cache, position, 1)[0].shape[2] == position - 9  # later single tokens fold nothing


def test_max_tokens_reached_while_decoding_folds_nothing():
    for fold_at in ("prefill", "decode"):
        cache = MergingDynamicCache(max_tokens=10, fold_at=fold_at, **LAST)
        feed(cache, 0, 8)
        for position in range(8, 20):
            assert cache.get_mask_sizes(1, 0) == (position + 1, 0)
            feed(cache, position, 1)
        assert cache.layers[0].num_stored == 20


def test_recording_defers_the_fold_to_crop():
    by_hand = MergingDynamicCache(compression_ratio=0.5, merger="drop", **LAST)
    feed(by_hand, 0, 22)
    cache = MergingDynamicCache(compression_ratio=0.5, merger="drop", **LAST)
    cache.activate_past_recording()
    feed(cache, 0, 25)
    assert cache.layers[0].num_stored == 25
    cache.crop(-3)
    layer = cache.layers[0]
    assert torch.equal(layer.positions, by_hand.layers[0].positions)
    feed(cache, 22, 4)  # drafts, which are not folded
    assert layer.num_stored == 15
    cache.crop(-4)
    assert layer.num_stored == 11
    assert torch.equal(layer.values, by_hand.layers[0].values)
    # a new prompt in the same recorded cache is folded at its crop
    cache.activate_past_recording()
    feed(cache, 22, 10)
    cache.crop(0)
    feed(by_hand, 22, 10)
    assert torch.equal(layer.positions, by_hand.layers[0].positions)


def test_crop_stops_at_folded_slots_and_changes_nothing_then():
    cache = MergingDynamicCache(compression_ratio=0.5, **LAST)
    assert cache.is_croppable
    feed(cache, 0, 20)
    assert not cache.is_croppable
    feed(cache, 20, 1)
    feed(cache, 21, 1)
    before = cache.layers[0].keys.clone()
    with pytest.raises(ValueError, match=r"cannot crop 3 tokens from layer 0: only the last 2 are .*activate_past_rec"):
        cache.crop(-3)
    assert torch.equal(cache.layers[0].keys, before)
    cache.crop(-2)
    assert cache.get_seq_length() == 20
    cache.crop(0)
    feed(cache, 20, 1)
    assert cache.layers[0].positions[0, 0].tolist() == list(range(10, 21))


def test_crop_of_an_unfolded_cache():
    cache = MergingDynamicCache(compression_ratio=0, **LAST)
    cache.crop(0)  # nothing there yet
    feed(cache, 0, 20)
    cache.crop(-5)
    assert cache.layers[0].positions[0, 0].tolist() == list(range(15))
    with pytest.raises(ValueError, match="cannot crop 16 tokens: layer 0 has seen only 15"):
        cache.crop(-16)
    cache.crop(-15)
    feed(cache, 0, 3, batch=4)
    assert cache.layers[0].keys.shape[0] == 4


BUILDERS = {
    "dynamic": MergingDynamicCache,
    "fp8": lambda **options: MergingQuantizedCache("fp8", residual_length=4, **options),
    "quanto": lambda **options: MergingQuantizedCache("quanto", residual_length=4, **options),
}


@pytest.mark.parametrize("kind", BUILDERS)
def test_batch_operations(kind):
    cache = BUILDERS[kind](compression_ratio=0.5, scorer="knorm", attention_mask=torch.ones(3, 20), recent_tokens=2)
    torch.manual_seed(1)
    cache.update(torch.randn(3, 2, 20, 32), torch.randn(3, 2, 20, 32), 0)
    for _ in range(6):
        cache.update(torch.randn(3, 2, 1, 32), torch.randn(3, 2, 1, 32), 0)
    layer = cache.layers[0]
    keys, values, positions, merged = layer.keys, layer.values, layer.positions, layer.num_merged

    def expect(rows):
        assert torch.equal(layer.keys, keys[rows])
        assert torch.equal(layer.values, values[rows])
        assert torch.equal(layer.positions, positions[rows])
        assert torch.equal(layer.num_merged, merged[rows])
        assert layer.batch == len(rows)

    cache.reorder_cache(torch.tensor([2, 0, 0]))
    expect([2, 0, 0])
    cache.batch_repeat_interleave(2)
    expect([2, 2, 0, 0, 0, 0])
    cache.batch_select_indices(torch.tensor([1, 2]))
    expect([2, 0])
    cache.batch_select_indices(torch.tensor([False, True]))
    expect([0])
    cache.update(torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32), 0)
    assert torch.equal(layer.keys[:, :, :-1], keys[:1])


@pytest.mark.parametrize("kind", BUILDERS)
def test_deepcopies_are_independent(kind):
    cache = BUILDERS[kind](compression_ratio=0.5, scorer="knorm", recent_tokens=2)
    cache.update(torch.randn(1, 2, 20, 32), torch.randn(1, 2, 20, 32), 0)
    keys = cache.layers[0].keys.clone()
    twin = copy.deepcopy(cache)
    for each in (twin, cache):
        for _ in range(9):
            each.update(torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32), 0)
    assert torch.equal(twin.layers[0].keys[:, :, :10], keys)
    assert torch.equal(cache.layers[0].keys[:, :, :10], keys)
    assert not torch.equal(twin.layers[0].keys, cache.layers[0].keys)


@pytest.mark.parametrize("kind", BUILDERS)
def test_saving_and_loading(kind, tmp_path):
    cache = BUILDERS[kind](compression_ratio=0.5, scorer="knorm", recent_tokens=2)
    cache.update(torch.randn(1, 2, 20, 32), torch.randn(1, 2, 20, 32), 0)
    torch.save(cache, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=False)
    for each in (cache, loaded):
        each.update(torch.ones(1, 2, 1, 32), torch.ones(1, 2, 1, 32), 0)
    assert torch.equal(loaded.layers[0].keys, cache.layers[0].keys)
    assert torch.equal(loaded.layers[0].positions, cache.layers[0].positions)
    assert loaded.get_seq_length() == 21


@pytest.mark.parametrize("kind", BUILDERS)
def test_reset_and_reuse(kind):
    cache = BUILDERS[kind](compression_ratio=0.5, scorer="knorm", attention_mask=torch.ones(1, 20))
    keys, values = torch.randn(1, 2, 80, 32), torch.randn(1, 2, 80, 32)
    cache.update(keys, values, 0)
    first = cache.layers[0].keys.clone()
    cache.reset()
    assert (cache.get_seq_length(), cache.layers[0].keys, cache.attention_mask) == (0, None, None)
    assert cache.layers[0].nbytes == 0
    cache.update(keys, values, 0)
    assert torch.equal(cache.layers[0].keys, first)


def test_guards_name_the_layer_and_change_nothing():
    cache = MergingDynamicCache(compression_ratio=0.5, attention_mask=torch.ones(2, 20), **LAST)
    feed(cache, 0, 20, batch=2)
    before = cache.layers[0].keys.clone()
    for bad, message in [
        (coded(20, 1, batch=3), "layer 0 holds a batch of 2 rows, but got 3"),
        (coded(20, 1, batch=2, heads=1), "layer 0 holds 2 KV heads"),
        (coded(20, 1, batch=2, dim=8), "is this cache from another model"),
        (coded(20, 0, batch=2), "layer 0 got no new tokens"),
        ((torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)), "expected \\(batch, kv_heads, tokens, head_dim\\)"),
        ((torch.full((2, 2, 3, 4), torch.nan), torch.zeros(2, 2, 3, 4)), "layer 0 has non-finite keys"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.update(*bad, 0)
    assert torch.equal(cache.layers[0].keys, before)
    assert cache.get_seq_length() == 20


def test_latent_attention_may_be_dropped_but_not_merged():
    keys, values = torch.randn(1, 1, 20, 8), torch.randn(1, 1, 20, 4)
    with pytest.raises(ValueError, match="latent attention .*Use merger='drop'"):
        MergingDynamicCache(compression_ratio=0.5, merger="similarity").update(keys, values, 0)
    cache = MergingDynamicCache(compression_ratio=0.5)
    cache.update(keys, values, 0)
    assert cache.layers[0].values.shape == (1, 1, 10, 4)


def test_unknown_padding_warns_once():
    keys = torch.randn(2, 2, 20, 4)
    cache = MergingDynamicCache(compression_ratio=0.5)
    with pytest.warns(UserWarning, match="batch of 2 rows is folded without knowing its padding"):
        cache.update(keys, keys, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.update(keys, keys, 1)


@pytest.mark.filterwarnings("error", "ignore:Merging.* was given neither config")
def test_no_warning_where_there_is_nothing_to_know():
    keys = torch.randn(2, 2, 20, 4)
    MergingDynamicCache(compression_ratio=0.5, attention_mask=torch.ones(2, 20)).update(keys, keys, 0)
    beams = keys[:1].expand(2, -1, -1, -1)
    MergingDynamicCache(compression_ratio=0.5).update(beams, beams, 0)
    MergingDynamicCache(compression_ratio=0).update(keys, keys, 0)


def test_padding_follows_the_rows_and_later_columns():
    mask = torch.ones(2, 20)
    mask[1, :15] = 0
    cache = MergingDynamicCache(compression_ratio=0.5, attention_mask=mask, **LAST)
    feed(cache, 0, 20, batch=2)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.attention_mask[:, 0].tolist() == [0, 1]
    feed(cache, 20, 4, batch=2)
    assert cache.layers[0].positions[0, 0].tolist()[3:] == list(range(15, 24))
    with pytest.raises(ValueError, match="attention_mask has 2 rows, but the batch has 3"):
        feed(MergingDynamicCache(attention_mask=mask), 0, 20, batch=3)
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 1, 20\)"):
        cache.attention_mask = mask[:, None]


def test_taking_a_cache_apart_is_refused():
    with pytest.raises(TypeError, match="cannot be taken apart"):
        list(MergingDynamicCache())


def test_offloading_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device is available"):
        MergingDynamicCache(offloading=True)
    with pytest.raises(ValueError, match="MergingQuantizedCache does not offload"):
        MergingQuantizedCache("fp8", offloading=True)
