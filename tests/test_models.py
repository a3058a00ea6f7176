"""Model families one by one, tiny and from configs: bit-exact at ratio 0, and equal to feeding by hand when folded."""

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from architectures import tiny_config
from merging_cache import MergingDynamicCache, MergingQuantizedCache
from merging_cache.model import cache_argument
from models import CACHES, WINDOW, greedy, prompt, run_by_hand, tiny_model

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore")]

LENGTH = 40
FULL = ["llama", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"]
HYBRID = ["gemma2", "gemma3_text", "gpt_oss"]  # half of the layers have a sliding window
LINEAR = ["qwen3_next", "falcon_h1"]
families = pytest.mark.parametrize("family", [*FULL, *HYBRID, *LINEAR])
attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def build(family, attention="sdpa"):
    if family in ("gpt_oss", "gemma2"):
        attention = "eager"  # attention sinks and soft caps have no sdpa path
    try:
        return tiny_model(family, attention=attention)
    except Exception as error:
        if family not in LINEAR:
            raise
        pytest.skip(f"this transformers cannot build the family from its config: {error}")


def keeps_its_own_cache(family, model):
    """Before transformers 5.5, hybrids of linear attention bring a cache class of their own."""
    try:
        model(prompt(4), **cache_argument(DynamicCache(config=model.config)))
    except Exception:
        return True
    return False


@families
@attentions
def test_ratio_zero_is_bit_exact(family, attention):
    model, ids = build(family, attention), prompt(LENGTH)
    if keeps_its_own_cache(family, model):
        pytest.skip("this transformers gives the family a cache of its own")
    one = greedy(model, ids, **cache_argument(DynamicCache(config=model.config)))
    other = greedy(model, ids, **cache_argument(CACHES["dynamic"](model, compression_ratio=0)))
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))


@families
@attentions
@pytest.mark.parametrize("kind", ["dynamic", "fp8"])
def test_folded_generation_equals_feeding_by_hand(family, attention, kind):
    model, ids = build(family, attention), prompt(LENGTH)
    if keeps_its_own_cache(family, model):
        pytest.skip("this transformers gives the family a cache of its own")
    cache = CACHES[kind](model, compression_ratio=0.5)
    output = greedy(model, ids, **cache_argument(cache))
    twin = CACHES[kind](model, compression_ratio=0.5)
    logits = run_by_hand(model, twin, ids, output.sequences[:, LENGTH:-1])
    torch.testing.assert_close(torch.stack(output.logits), logits, rtol=1e-4, atol=1e-4)
    folded = [layer for layer in cache.folding_layers if layer.num_stored]
    assert folded
    for layer in folded:
        assert layer.num_stored == LENGTH // 2 + 7
        evicted = LENGTH - LENGTH // 2
        assert (layer.num_merged + layer.num_dropped == evicted).all()
    # and a second turn with the same object
    text = torch.cat([output.sequences, prompt(9, seed=2)], 1)
    second = greedy(model, text, **cache_argument(cache), new_tokens=4)
    logits = run_by_hand(model, twin, text[:, LENGTH + 7 :], second.sequences[:, text.shape[1] : -1])
    torch.testing.assert_close(torch.stack(second.logits), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", HYBRID)
def test_sliding_layers_stay_transformers_own(family):
    model = build(family)
    cache = CACHES["dynamic"](model, compression_ratio=0.5)
    greedy(model, prompt(LENGTH), **cache_argument(cache))
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "MergingLayer"]
    assert cache.get_seq_length() == LENGTH + 7
    assert [row.kind for row in cache.report().layers] == ["DynamicSlidingWindowLayer", "folding"]


@pytest.mark.parametrize("family", HYBRID)
def test_padded_hybrids_equal_rows_alone(family):
    from models import left_padded

    model, inputs = build(family), left_padded([LENGTH, 26])
    cache = CACHES["dynamic"](model, max_tokens=18, attention_mask=inputs["attention_mask"])
    together = torch.stack(greedy(model, inputs, **cache_argument(cache)).logits)
    for row, length in enumerate((LENGTH, 26)):
        alone = inputs["input_ids"][row : row + 1, LENGTH - length :]
        one = torch.stack(greedy(model, alone, **cache_argument(CACHES["dynamic"](model, max_tokens=18))).logits)
        torch.testing.assert_close(together[:, row], one[:, 0], rtol=1e-4, atol=1e-4)


def test_a_quantized_cache_takes_sliding_models():
    model = build("gemma3_text")
    cache = MergingQuantizedCache("quanto", config=model.config, compression_ratio=0.5, **WINDOW)
    greedy(model, prompt(LENGTH), **cache_argument(cache), num_beams=2)
    assert cache.layers[1].storage.segments


def test_mistral_folds_unless_it_has_a_window():
    config = tiny_config("mistral")
    assert config.sliding_window == 16
    with pytest.warns(UserWarning, match="No layer of MistralConfig has full attention.*nothing will be folded"):
        cache = MergingDynamicCache(config=config)
    model = tiny_model("mistral")
    one = greedy(model, prompt(LENGTH), **cache_argument(DynamicCache(config=config)))
    other = greedy(model, prompt(LENGTH), **cache_argument(cache))
    assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))
    model.config.sliding_window = None
    cache = CACHES["dynamic"](model, compression_ratio=0.5)
    greedy(model, prompt(LENGTH), **cache_argument(cache))
    assert [layer.num_slots for layer in cache.layers] == [20, 20]


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_latent_attention_drops_or_refuses(family):
    model, ids = tiny_model(family), prompt(LENGTH)
    with pytest.raises(ValueError, match=f"{family} has multi-head latent attention .*Use merger='drop'"):
        MergingDynamicCache(config=model.config, merger="similarity", compression_ratio=0.5)
    one = greedy(model, ids, **cache_argument(DynamicCache(config=model.config)))
    other = greedy(model, ids, **cache_argument(CACHES["dynamic"](model, compression_ratio=0)))
    assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))
    cache = CACHES["dynamic"](model, compression_ratio=0.5, merger="drop")
    output = greedy(model, ids, **cache_argument(cache))
    twin = CACHES["dynamic"](model, compression_ratio=0.5, merger="drop")
    logits = run_by_hand(model, twin, ids, output.sequences[:, LENGTH:-1])
    torch.testing.assert_close(torch.stack(output.logits), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_position_biases_are_refused(family):
    model = tiny_model(family, attention="eager")
    with pytest.raises(ValueError, match=f"{family} adds a position bias"):
        MergingDynamicCache(config=model.config)
    one = greedy(model, prompt(LENGTH), **cache_argument(DynamicCache(config=model.config)))
    other = greedy(model, prompt(LENGTH), **cache_argument(CACHES["dynamic"](model, compression_ratio=0)))
    assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))


def test_windows_by_place_in_the_cache_are_refused():
    model = tiny_model("gpt_neo", attention="eager")
    with pytest.raises(ValueError, match="gpt_neo masks its local layers by a key's place in the cache"):
        MergingDynamicCache(config=model.config)


@torch.no_grad()
def test_a_crop_that_one_layer_refuses_changes_no_layer():
    model = tiny_model("gemma3_text")
    cache = CACHES["dynamic"](model, compression_ratio=0.5)
    model(prompt(LENGTH), **cache_argument(cache))
    for token in (5, 6, 7):
        model(torch.tensor([[token]]), **cache_argument(cache))
    before = [(layer.keys.clone(), layer.get_seq_length()) for layer in cache.layers]
    with pytest.raises((RuntimeError, ValueError), match="crop"):
        cache.crop(-2)
    for layer, (keys, seen) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert layer.get_seq_length() == seen


def encoder_decoder(family):
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(tiny_config(family)).eval()


def test_bart_decoder():
    model, ids, start = encoder_decoder("bart"), prompt(12), prompt(LENGTH, seed=3)
    start[0, 0] = 2
    options = {"decoder_input_ids": start, "decoder_start_token_id": 2, "num_beams": 2}

    def caches(**merging):
        return EncoderDecoderCache(
            CACHES["dynamic"](model, **merging) if merging else DynamicCache(config=model.config),
            DynamicCache(config=model.config),
        )

    one = greedy(model, ids, **cache_argument(caches()), **options)
    other = greedy(model, ids, **cache_argument(caches(compression_ratio=0)), **options)
    assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))
    cache, twin = caches(compression_ratio=0.5), caches(compression_ratio=0.5)
    output = greedy(model, ids, **cache_argument(cache), **options | {"num_beams": 1})
    assert cache.self_attention_cache.layers[0].num_slots == LENGTH // 2
    logits = [model(ids, decoder_input_ids=start, **cache_argument(twin)).logits[:, -1]]
    for token in output.sequences[:, LENGTH:-1].split(1, 1):
        logits.append(model(ids, decoder_input_ids=token, **cache_argument(twin)).logits[:, -1])
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(logits), rtol=1e-4, atol=1e-4)


def test_t5_has_relative_positions():
    model = encoder_decoder("t5")
    with pytest.raises(ValueError, match="t5 adds a position bias"):
        MergingDynamicCache(config=model.config)
    outputs = []
    for self_attention in (DynamicCache(config=model.config), CACHES["dynamic"](model, compression_ratio=0)):
        cache = EncoderDecoderCache(self_attention, DynamicCache(config=model.config))
        outputs.append(greedy(model, prompt(12), **cache_argument(cache), decoder_start_token_id=0))
    assert torch.equal(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))


def vision_language_model():
    from transformers import CLIPVisionConfig

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny_config("llama"), image_token_id=3, image_seq_length=4)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("kind", ["dynamic", "quanto"])
def test_llava_with_an_image(kind):
    model = vision_language_model()
    ids = prompt(LENGTH)
    ids[0, 5:9] = 3  # where the image's four patches go
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    one = greedy(model, inputs, **cache_argument(DynamicCache(config=model.config)))
    other = greedy(model, inputs, **cache_argument(CACHES["dynamic"](model, compression_ratio=0)))
    assert torch.equal(torch.stack(one.logits), torch.stack(other.logits))
    cache = CACHES[kind](model, compression_ratio=0.5)
    output = greedy(model, inputs, **cache_argument(cache))
    assert [layer.num_slots for layer in cache.layers] == [LENGTH // 2] * 2
    twin = CACHES[kind](model, compression_ratio=0.5)
    logits = run_by_hand(model, twin, inputs, output.sequences[:, LENGTH:-1])
    torch.testing.assert_close(torch.stack(output.logits), logits, rtol=1e-4, atol=1e-4)
