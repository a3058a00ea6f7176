"""Quantized storage: what is stored is quantize(merge(full precision)), once, and nothing else touches it."""

import copy
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from merging_cache import LayerStates, MergingConfig, MergingDynamicCache, MergingQuantizedCache
from merging_cache.model import cache_argument
from merging_cache.storage import QuantizedStorage, make_backend
from models import CACHES, llama, prompt

BACKENDS = {
    "quanto4": ("quanto", {"nbits": 4}),
    "quanto2": ("quanto", {"nbits": 2}),
    "quanto4-across-tokens": ("quanto", {"nbits": 4, "axis_key": -1, "axis_value": -1}),
    "fp8": ("fp8", {}),
    "hqq4": ("hqq", {"nbits": 4}),
    "hqq2": ("hqq", {"nbits": 2}),
    "hqq4-across-tokens": ("hqq", {"nbits": 4, "axis_key": 0, "axis_value": 0}),
}
FOLD = {"scorer": "knorm", "compression_ratio": 0.5, "sink_tokens": 2, "recent_tokens": 5}
# relative error of N(0, 1) values after a round trip: as published for these formats, with some room
ERROR = {
    "quanto4": 0.1,
    "quanto2": 0.5,
    "quanto4-across-tokens": 0.1,
    "fp8": 0.03,
    "hqq4": 0.1,
    "hqq2": 0.5,
    "hqq4-across-tokens": 0.1,
}


def build(name, **options):
    backend, bits = BACKENDS[name]
    if backend == "hqq":
        pytest.importorskip("hqq")
    return MergingQuantizedCache(backend, **bits, **options)


def backend_of(name):
    backend, bits = BACKENDS[name]
    if backend == "hqq":
        pytest.importorskip("hqq")
    options = dict.fromkeys(("nbits", "axis_key", "axis_value", "q_group_size")) | bits
    return make_backend(backend, **options)


def counted(cache):
    """Count the calls of the cache's backend."""
    calls = {"quantize": 0, "dequantize": 0}
    backend = cache._backend

    def spy(name):
        method = getattr(backend, name)

        def call(*args):
            calls[name] += 1
            return method(*args)

        return call

    for name in calls:
        setattr(backend, name, spy(name))
    return calls


@pytest.mark.core
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dim", [32, 64, 80])
@pytest.mark.parametrize("merger", ["drop", "similarity"])
def test_stores_the_quantized_merge_exactly(name, dim, merger):
    keys, values = torch.randn(2, 2, 150, dim), torch.randn(2, 2, 150, dim)
    cache = build(name, merger=merger, **FOLD, attention_mask=torch.ones(2, 150))
    returned, _ = cache.update(keys, values, 0)
    assert torch.equal(returned, keys)  # the prompt attends to its exact self
    slots = MergingConfig(merger=merger, **FOLD).build()(LayerStates(keys, values, layer_idx=0), 75)
    layer, backend = cache.layers[0], backend_of(name)
    fitting = layer.storage.segments[0].length
    assert fitting > 75 - 64
    for stored, exact, axis in (
        (layer.keys, slots.keys, backend.axis_key),
        (layer.values, slots.values, backend.axis_value),
    ):
        expected = backend.dequantize(backend.quantize(exact[:, :, :fitting].contiguous(), axis))
        assert torch.equal(stored[:, :, :fitting], expected)
        assert torch.equal(stored[:, :, fitting:], exact[:, :, fitting:])  # what does not fill a group stays exact
        error = (stored - exact).norm() / exact.norm()
        assert error < ERROR[name]
    assert torch.equal(layer.positions, slots.positions)


@pytest.mark.core
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_it_came(name, dtype):
    cache = build(name, **FOLD)
    keys = torch.randn(1, 2, 128, 64, dtype=dtype)
    cache.update(keys, keys, 0)
    layer = cache.layers[0]
    assert layer.keys.dtype == layer.values.dtype == dtype
    exact = keys.gather(2, layer.positions[..., None].expand(-1, -1, -1, 64))
    assert (layer.keys - exact).norm() / exact.norm() < ERROR[name]


@pytest.mark.core
@pytest.mark.parametrize("name", BACKENDS)
def test_one_quantization_a_prompt_and_none_of_old_segments(name):
    cache = build(name, residual_length=8, **FOLD)
    calls = counted(cache)
    cache.update(torch.randn(1, 2, 128, 64), torch.randn(1, 2, 128, 64), 0)
    assert calls == {"quantize": 2, "dequantize": 0}
    storage = cache.layers[0].storage
    first = storage.segments[0]
    new = [(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64)) for _ in range(96)]
    for keys, values in new:
        cache.update(keys, values, 0)
        assert storage.segments[0] is first
    # one segment of keys and values for each time the residual was full
    assert calls["quantize"] == 2 * len(storage.segments)
    assert len(storage.segments) > 1
    assert storage.length == 64 + 96
    # a second prompt reads everything once, merges, and quantizes once more
    storage_before = list(storage.segments)
    calls.update(quantize=0, dequantize=0)
    cache.update(torch.randn(1, 2, 32, 64), torch.randn(1, 2, 32, 64), 0)
    assert calls == {"quantize": 2, "dequantize": 2 * len(storage_before)}
    assert cache.layers[0].num_stored == 128


@pytest.mark.core
@pytest.mark.parametrize("name", BACKENDS)
def test_the_tail_is_exact_until_it_is_a_segment(name):
    cache = build(name, residual_length=64, **FOLD)
    cache.update(torch.randn(1, 2, 128, 64), torch.randn(1, 2, 128, 64), 0)
    tail = [torch.randn(1, 2, 1, 64) for _ in range(63)]
    for keys in tail:
        returned, _ = cache.update(keys, keys, 0)
    assert torch.equal(returned[:, :, 64:], torch.cat(tail, 2))


@pytest.mark.core
@pytest.mark.parametrize("name", ["quanto4", "quanto2", "fp8", "hqq4"])
def test_a_second_fold_does_not_lose_untouched_slots_again(name):
    """Groups lie inside a token, so quantizing again what was quantized costs (nearly) nothing."""
    cache = build(name, merger="drop", **FOLD)
    cache.update(torch.randn(1, 2, 128, 64), torch.randn(1, 2, 128, 64), 0)
    layer = cache.layers[0]
    before, positions = layer.values, layer.positions
    cache.update(torch.randn(1, 2, 2, 64), torch.randn(1, 2, 2, 64), 0)
    for head in range(2):
        kept = {p: i for i, p in enumerate(positions[0, head].tolist())}
        old = [(kept[p], i) for i, p in enumerate(layer.positions[0, head].tolist()) if p in kept]
        was, now = (torch.tensor(indices) for indices in zip(*old, strict=True))
        drift = (layer.values[0, head][now] - before[0, head][was]).norm() / before[0, head][was].norm()
        assert drift < 0.005


@pytest.mark.core
@pytest.mark.parametrize("name", BACKENDS)
def test_crop_reaches_into_segments(name):
    cache = build(name, residual_length=8, compression_ratio=0)
    for _ in range(50):
        cache.update(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), 0)
    layer = cache.layers[0]
    keys = layer.keys
    for left in (50, 47, 33, 32, 5, 1):
        cache.crop(left - cache.get_seq_length())
        assert torch.equal(layer.keys, keys[:, :, :left])
    cache.update(torch.randn(1, 2, 3, 64), torch.randn(1, 2, 3, 64), 0)
    assert torch.equal(layer.keys[:, :, :1], keys[:, :, :1])
    assert layer.num_stored == 4


@pytest.mark.core
@pytest.mark.parametrize("name", ["quanto4", "fp8"])
def test_waiting_prompts_stay_exact(name):
    """Before a deferred fold, and while drafts may be taken back, nothing is quantized."""
    chunks = [torch.randn(1, 2, 40, 64) for _ in range(4)]
    one_piece = build(name, residual_length=8, **FOLD)
    one_piece.update(torch.cat(chunks, 2), torch.cat(chunks, 2), 0)
    deferred = build(name, residual_length=8, fold_at="decode", **FOLD)
    recorded = build(name, residual_length=8, **FOLD)
    recorded.activate_past_recording()
    for chunk in chunks:
        deferred.update(chunk, chunk, 0)
        recorded.update(chunk, chunk, 0)
    for cache in (deferred, recorded):
        assert cache.layers[0].storage.segments == []
        assert torch.equal(cache.layers[0].keys, torch.cat(chunks, 2))
    recorded.crop(0)
    deferred.update(torch.zeros(1, 2, 1, 64), torch.zeros(1, 2, 1, 64), 0)
    assert torch.equal(recorded.layers[0].keys, one_piece.layers[0].keys)
    assert torch.equal(deferred.layers[0].keys[:, :, :-1], one_piece.layers[0].keys)


@pytest.mark.core
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 0.085), (torch.bfloat16, 0.17)])
def test_bytes_at_four_bits_and_half_the_tokens(dtype, bound):
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(dtype)
    cache = MergingQuantizedCache("quanto", nbits=4, config=config, compression_ratio=0.5)
    model(torch.randint(0, 99, (1, 2048)), **cache_argument(cache))
    report = cache.report().total
    assert report.bytes_full == 2 * 2 * 2 * 2048 * 64 * dtype.itemsize
    print(f"{dtype}: {report.bytes_now / report.bytes_full:.4f} of DynamicCache's bytes")
    assert report.bytes_now <= bound * report.bytes_full


@pytest.mark.core
@pytest.mark.parametrize("name", BACKENDS)
def test_report_counts_every_tensor(name):
    cache = build(name, residual_length=8, **FOLD)
    cache.update(torch.randn(1, 2, 128, 64), torch.randn(1, 2, 128, 64), 0)
    cache.update(torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64), 0)
    bits = {"quanto4": 4, "quanto2": 2, "quanto4-across-tokens": 4, "fp8": 8}.get(name)
    if bits is None:
        return
    elements = 2 * 2 * 64 * 64  # keys and values, heads, slots, dimension
    scales = elements // 64 * (4 if name == "fp8" else 8)
    residual = 2 * 2 * 64 * 4
    positions_and_counts = 2 * 64 * 4 + 2 * 2 * 8
    assert cache.layers[0].nbytes == elements * bits // 8 + scales + residual + positions_and_counts


def test_a_quantized_cache_without_folding_is_a_quantized_cache():
    keys, values = torch.randn(1, 2, 300, 64), torch.randn(1, 2, 300, 64)
    cache = MergingQuantizedCache("quanto", compression_ratio=0)
    cache.update(keys, values, 0)
    layer = cache.layers[0]
    assert layer.num_stored == 300
    assert 0 < (layer.keys - keys).norm() / keys.norm() < 0.1
    short = MergingQuantizedCache("quanto", compression_ratio=0, residual_length=512)
    short.update(keys, values, 0)
    assert torch.equal(short.layers[0].keys, keys)


def test_copies_share_what_is_packed():
    cache = MergingQuantizedCache("quanto", **FOLD)
    cache.update(torch.randn(1, 2, 128, 64), torch.randn(1, 2, 128, 64), 0)
    twin = copy.deepcopy(cache)
    assert twin.layers[0].storage is not cache.layers[0].storage
    assert twin.layers[0].storage.segments[0] is cache.layers[0].storage.segments[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "gguf"}, "backend is 'gguf'; choose one of"),
        ({"backend": "quanto", "nbits": 3}, "nbits of backend 'quanto' is 3; choose one of"),
        ({"backend": "quanto", "q_group_size": 0}, "q_group_size is 0; it must be at least 1"),
        ({"backend": "quanto", "axis_key": 1}, "axis_key of backend 'quanto' is 1"),
        ({"backend": "quanto", "q_group_size": 0}, "q_group_size is 0"),
        ({"backend": "fp8", "nbits": 8}, r"backend 'fp8' has one scale per token and takes no \['nbits'\]"),
        ({"backend": "fp8", "residual_length": 0}, "residual_length is 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MergingQuantizedCache(**options)


def test_the_backend_comes_first():
    with pytest.raises(TypeError, match="backend is LlamaConfig; give the name of one of"):
        MergingQuantizedCache(LlamaConfig())


@pytest.mark.parametrize("package", ["quanto", "hqq"])
def test_a_missing_package_says_what_to_install(package, monkeypatch):
    import sys

    for module in ("optimum.quanto", "hqq", "hqq.core.quantize"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install 'merging_cache\\[{package}\\]'"):
        MergingQuantizedCache(package)


def test_fp8_handles_zeros_and_outliers():
    backend = backend_of("fp8")
    states = torch.zeros(1, 1, 3, 8)
    states[..., 1, :] = torch.tensor([1e4, 1, 0, 0, -1e4, 0, 0, 0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        back = backend.dequantize(backend.quantize(states.to(dtype), -1))
        assert back.isfinite().all()
        assert torch.equal(back[:, :, 0], torch.zeros(1, 1, 8, dtype=dtype))
        torch.testing.assert_close(back, states.to(dtype), rtol=0.07, atol=30)


def test_storage_reads_what_was_appended_in_order():
    storage = QuantizedStorage(backend_of("quanto4"), residual_length=1000)
    pieces = [torch.randn(1, 2, n, 64) for n in (3, 1, 7)]
    for piece in pieces:
        storage.append(piece, piece)
    assert torch.equal(storage.read()[0], torch.cat(pieces, 2))


def test_dynamic_and_quantized_choose_the_same_survivors():
    keys, values = torch.randn(1, 2, 128, 64), torch.randn(1, 2, 128, 64)
    caches = MergingDynamicCache(**FOLD), MergingQuantizedCache("quanto", nbits=2, **FOLD)
    for cache in caches:
        cache.update(keys, values, 0)
    assert torch.equal(caches[0].layers[0].positions, caches[1].layers[0].positions)


@pytest.mark.parametrize("kind", ["quanto4", "fp8"])
def test_pickled_caches_go_on(kind):
    model = llama()
    cache = CACHES["fp8" if kind == "fp8" else "quanto"](model, compression_ratio=0.5)
    with torch.no_grad():
        model(prompt(64), **cache_argument(cache))
        thawed = pickle.loads(pickle.dumps(cache))
        logits = [model(prompt(1), **cache_argument(one)).logits for one in (cache, thawed)]
    assert torch.equal(*logits)
