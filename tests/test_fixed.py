"""Fixed caches: the same tokens as the merging cache they are made of, by one graph that is compiled once."""

import pytest
import torch
from transformers.cache_utils import StaticLayer

from architectures import tiny_model
from merging_cache import MergingDynamicCache, MergingQuantizedCache
from merging_cache.layers import MergingHybridLayer
from merging_cache.model import cache_argument
from models import greedy, left_padded, llama, prompt

pytestmark = pytest.mark.core
OPTIONS = {"scorer": "keydiff", "merger": "similarity", "compression_ratio": 0.5, "recent_tokens": 4}


def prefilled(model, ids, mask=None, **options):
    cache = MergingDynamicCache(config=model.config, attention_mask=mask, **OPTIONS | options)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=None if mask is None else mask[:, :-1], **cache_argument(cache))
    return cache


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("length", [5, 60])
def test_generates_what_the_merging_cache_does(model_type, length):
    model, ids = (
        tiny_model(model_type, attention="eager" if model_type == "gemma2" else "sdpa"),
        prompt(length, batch=2),
    )
    cache = prefilled(model, ids)
    fixed = cache.fixed(max_new_tokens=9)
    output = greedy(model, ids, **cache_argument(fixed))
    expected = greedy(model, ids, **cache_argument(cache))
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)
    assert int(fixed.get_seq_length()) == cache.get_seq_length()


def test_padded_rows():
    model = llama()
    inputs = left_padded([40, 12, 33])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = prefilled(model, ids, mask)
    output = greedy(model, inputs, **cache_argument(cache.fixed(9)))
    expected = greedy(model, inputs, **cache_argument(cache))
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)


def test_one_prompt_goes_on_several_times():
    model, ids = llama(), prompt(50)
    cache = prefilled(model, ids)
    first, second = (greedy(model, ids, **cache_argument(cache.fixed(9))).sequences for _ in range(2))
    assert torch.equal(first, second)
    assert cache.get_seq_length() == 49


def test_a_fold_that_is_due_is_done():
    model, ids = llama(), prompt(50)
    cache = prefilled(model, ids, fold_at="decode")
    assert cache.layers[0].num_stored == 49
    assert cache.fixed(4).layers[0].keys.shape[2] == 24 + 4


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "expected_graphs"), [("llama", 1), ("gemma3_text", 2)])
def test_decoding_compiles_once(model_type, expected_graphs):
    """256 tokens by one graph without breaks, and one more for a sliding window that was full before."""
    model, ids = tiny_model(model_type), prompt(50)
    cache = prefilled(model, ids)
    fixed, graphs = cache.fixed(256), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    token = expected_token = torch.full((1, 1), ids[0, -1].item())
    with torch.no_grad():
        for step in range(256):
            logits = compiled(token, **cache_argument(fixed)).logits[:, -1]
            if step < 20:
                expected = model(expected_token, **cache_argument(cache)).logits[:, -1]
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
                expected_token = expected.argmax(-1, keepdim=True)
            token = logits.argmax(-1, keepdim=True)
    assert len(graphs) == expected_graphs


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_beams_reorder_its_rows(model_type):
    model, ids = tiny_model(model_type), prompt(50)
    cache = prefilled(model, ids)
    cache.batch_repeat_interleave(3)
    fixed = cache.fixed(9)
    how = {"num_beams": 3, "output_logits": False, "output_scores": True}
    output = greedy(model, ids, **cache_argument(fixed), **how)
    expected = greedy(model, ids, **cache_argument(cache), **how)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has 3 rows and cannot have 2"):
        fixed.reorder_cache(torch.tensor([0, 1]))


def test_another_batch_is_refused():
    model, ids = llama(), prompt(50, batch=2)
    fixed = prefilled(model, ids).fixed(9)
    before = fixed.layers[0].keys.clone()
    for batch, heads in ((1, 2), (3, 2), (2, 1)):
        states = torch.randn(batch, heads, 1, 16)
        with pytest.raises(ValueError, match=r"holds a batch of 2 rows, but got|holds 2 KV heads"):
            fixed.layers[0].update(states, states)
    with torch.no_grad(), pytest.raises(ValueError, match="holds a batch of 2 rows, but got 1"):
        model(ids[:1, :1], **cache_argument(fixed))
    assert torch.equal(fixed.layers[0].keys, before)
    assert fixed.get_seq_length() == 49


def test_a_fixed_layer_has_what_a_static_layer_has():
    model, ids = llama(), prompt(50, batch=2)
    layer = prefilled(model, ids).fixed(9).layers[0]
    static = StaticLayer(max_cache_len=layer.max_cache_len)
    static.lazy_initialization(layer.keys, layer.values)
    ours = {name: value for name, value in vars(layer).items() if not isinstance(value, torch.Tensor)}
    theirs = {name: value for name, value in vars(static).items() if not isinstance(value, torch.Tensor)}
    assert theirs.items() <= ours.items()


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_generate_is_told_that_it_cannot_be_cropped(model_type):
    """Or it would stop later than asked and crop what was too much, where it checks for stops late (on MPS)."""
    model, ids = tiny_model(model_type), prompt(50)
    assert not prefilled(model, ids).fixed(9).is_croppable


@pytest.mark.parametrize("options", [{"budget": "adakv"}, {"merger": "mass"}], ids=str)
def test_what_only_linked_attention_reads_is_refused(options):
    model, ids = llama(), prompt(50)
    cache = MergingDynamicCache(model=model, **OPTIONS | options)
    model(ids, **cache_argument(cache))
    with pytest.raises(ValueError, match="cannot be fixed"):
        cache.fixed(4)
    cache.release()


def test_refused():
    model, ids = llama(), prompt(50)
    with pytest.raises(ValueError, match="has not seen a prompt"):
        MergingDynamicCache(config=model.config).fixed(4)
    with pytest.raises(ValueError, match="quantized"):
        MergingQuantizedCache(config=model.config, backend="fp8").fixed(4)
    cache = prefilled(model, ids)
    with pytest.raises(ValueError, match="max_new_tokens"):
        cache.fixed(0)
    fixed = cache.fixed(4)
    for change in (fixed.reset, lambda: fixed.crop(-1), lambda: fixed.batch_repeat_interleave(2)):
        with pytest.raises(ValueError, match="goes on with one prompt"):
            change()
    with pytest.raises(ValueError, match=r"goes on with one prompt|not supported with Static cache"):
        model.generate(ids, **cache_argument(fixed), prompt_lookup_num_tokens=2, max_new_tokens=3, pad_token_id=0)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="records the past"):
        cache.fixed(4)


@pytest.mark.parametrize("again", [0, 3])
def test_a_prompt_that_was_read_is_not_read_again(again):
    """The whole prompt is in the cache, or was read by an earlier call: `generate` would slice off none of it."""
    model, ids = llama(), prompt(50)
    cache = MergingDynamicCache(config=model.config, **OPTIONS)
    with torch.no_grad():
        model(ids[:, : 50 - (again > 0)], **cache_argument(cache))
    fixed = cache.fixed(100)
    if again:
        model.generate(ids, **cache_argument(fixed), max_new_tokens=again, pad_token_id=0)
    with pytest.raises(ValueError, match="has already seen"):
        model.generate(ids, **cache_argument(fixed), max_new_tokens=4, pad_token_id=0)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_what_there_is_no_room_for_is_refused(model_type):
    model, ids = tiny_model(model_type), prompt(50)
    cache = prefilled(model, ids)
    fixed = cache.fixed(3)
    with torch.no_grad():
        for _ in range(3):
            expected = model(ids[:, :1], **cache_argument(fixed)).logits
        with pytest.raises(ValueError, match="has room for 0 more tokens, but 1 are to come"):
            model(ids[:, :1], **cache_argument(fixed))
        assert fixed.get_seq_length() == 52
        for _ in range(3):
            logits = model(ids[:, :1], **cache_argument(cache)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(MergingHybridLayer is None, reason="older transformers keep such states in the model")
def test_a_state_of_linear_attention_is_not_lost():
    model, ids = tiny_model("falcon_h1"), prompt(50)
    cache = prefilled(model, ids)
    with pytest.raises(ValueError, match="cannot fix a MergingHybridLayer"):
        cache.fixed(4)


def test_made_in_inference_mode_and_written_to_outside():
    model, ids = tiny_model("gemma3_text"), prompt(50)
    with torch.inference_mode():
        cache = MergingDynamicCache(config=model.config, **OPTIONS)
        model(ids[:, :-1], **cache_argument(cache))
        fixed = cache.fixed(9)
    output = greedy(model, ids, **cache_argument(fixed))
    expected = greedy(model, ids, **cache_argument(cache))
    assert torch.equal(output.sequences, expected.sequences)
