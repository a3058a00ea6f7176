"""The link to a model: who holds it, until when, and that it is the model's own decoder that is linked."""

import contextlib
import copy
import gc
import threading
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from architectures import tiny_config
from merging_cache import SCORERS, MergingDynamicCache, merging_attention
from merging_cache.model import CACHE_ARGUMENT, cache_argument
from merging_cache.model.link import is_linked
from models import WINDOW, SameInAllHeads, assert_same_cache, greedy, llama, prompt, tiny_model
from test_architectures import LENGTH, hiding

# Encoder-decoder models -----------------------------------------------------------------------------------------------

FAMILIES = ["bart", "mbart", "marian", "pegasus", "m2m_100", "blenderbot", "blenderbot-small", "plbart", "whisper"]
# what needs weights or another prompt, or reads something that these models do not have: a rotary embedding, a prompt
# that lies before what comes behind it
WEIGHTED = ("kvzap", "fast_kvzip")
ROTATING = ("expected_attention", "leverage", "compactor")
REREADING = ("kvzip", "leave_one_out", "probe")
STAGES = [{"scorer": name, "merger": "drop"} for name in sorted(SCORERS) if name not in WEIGHTED]
STAGES += [{"scorer": "keydiff", "budget": "adakv", "merger": "drop"}, {"merger": "drop"}]


def encoder_decoder(family):
    """A tiny model of this family, and what its encoder is given."""
    torch.manual_seed(0)
    try:
        config = tiny_config(family)
    except Exception as error:
        pytest.skip(f"transformers {transformers.__version__} cannot build it: {error}")
    kind = AutoModelForSpeechSeq2Seq if family == "whisper" else AutoModelForSeq2SeqLM
    model = kind.from_config(config).eval()
    if family == "whisper":
        return model, {"input_features": torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)}
    return model, {"input_ids": prompt(20, seed=7)}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", STAGES, ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_fold_what_they_attend_to_among_themselves(family, options):
    """The prompt as ever, and a step that is that of the full cache with each head's lost tokens hidden from it."""
    model, given = encoder_decoder(family)
    name = CACHE_ARGUMENT if CACHE_ARGUMENT in model.forward.__code__.co_varnames else "past_key_values"
    ids = prompt(LENGTH + 1)

    def run(own):
        cache = EncoderDecoderCache(own, DynamicCache(config=model.config))
        output = model(**given, decoder_input_ids=ids[:, :-1], **{name: cache})
        states = (output.encoder_last_hidden_state,)
        step = model(encoder_outputs=states, decoder_input_ids=ids[:, -1:], **{name: cache})
        return output.logits, step.logits

    expected, _ = run(DynamicCache())
    try:
        cache = MergingDynamicCache(model=model, **options, **WINDOW)
        logits, step = run(cache)
    except ValueError as refusal:
        reasons = {"rotary position embedding": ROTATING, "cannot read a prompt again": REREADING}
        assert [scorers for reason, scorers in reasons.items() if reason in str(refusal)] == [
            scorers for scorers in reasons.values() if options.get("scorer") in scorers
        ]
        return
    assert torch.equal(logits, expected)
    cache.release(model)
    assert not is_linked(model.config)
    hidden = {}
    for layer in cache.folding_layers:
        assert 0 < layer.slots_per_head.sum() < LENGTH * layer.shape.heads
        lost = torch.ones(*layer.positions.shape[:2], LENGTH + 1, dtype=torch.bool)
        # a head that has fewer slots than others has -1, which is hidden anyway
        hidden[layer.layer_idx] = lost.scatter_(2, layer.positions % (LENGTH + 1), False)[..., :LENGTH]
    with hiding(model, hidden):
        _, expected = run(DynamicCache())
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 20])  # of what the decoder reads; the encoder reads 20
def test_what_an_encoder_has_read_is_refused(length):
    model, given = encoder_decoder("bart")
    cache = MergingDynamicCache(model=model, scorer="snapkv", merger="mass", **WINDOW)
    both = EncoderDecoderCache(DynamicCache(config=model.config), cache)
    with pytest.raises(ValueError, match="holds what an encoder has read"):
        model(**given, decoder_input_ids=prompt(length), **{CACHE_ARGUMENT: both})


# Attention functions of users -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("options", [{"merger": "mass"}, {"merger": "drop"}, {"merger": "mass", "budget": "uniform"}])
def test_own_attention_functions_are_called(options):
    """With the mask that fits the slots: what is twice as sharp is so after a fold, too."""
    calls, name = [], "sharp"

    def sharp(module, query, key, value, attention_mask, **given):
        calls.append(key.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query * 2, key, value, attention_mask, **given)

    AttentionInterface.register(name, sharp)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model, other = llama(), llama()
    model.set_attn_implementation(name)
    for layer in other.model.layers:  # the same in sdpa's own
        layer.self_attn.scaling *= 2
    stages = {"scorer": SameInAllHeads(), "budget": "adakv"} | options
    logits = []
    for one in (model, other):
        cache = MergingDynamicCache(model=one, **stages, **WINDOW)
        one(prompt(60), **cache_argument(cache))
        calls.clear()
        logits.append(torch.cat([one(prompt(n, seed=n), **cache_argument(cache)).logits for n in (1, 4)], dim=1))
        if one is model:
            assert len(calls) == 4
    # the merger's weights are by queries as they were given
    if options["merger"] == "drop":
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


# Who holds it ---------------------------------------------------------------------------------------------------------


def linked_cache(model, **options):
    stages = {"scorer": "snapkv", "budget": "adakv", "merger": "mass"}
    return MergingDynamicCache(model=model, **stages | WINDOW | options)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"scorer": "auto", "budget": "auto", "merger": "auto"}])
def test_the_link_outlives_what_was_given(options):
    """A wrapper that is gone after its adapters were merged: what it wrapped goes on, and is released."""
    torch.manual_seed(0)
    inner = llama()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapped = get_peft_model(inner, config).eval()
    cache = linked_cache(wrapped, **options)
    wrapped(prompt(60), **cache_argument(cache))
    merged = wrapped.merge_and_unload()
    del wrapped
    gc.collect()
    twin = copy.deepcopy(cache)
    step = merged(prompt(20, seed=3), **cache_argument(cache)).logits
    assert torch.equal(merged(prompt(20, seed=3), **cache_argument(twin)).logits, step)
    twin.release()
    assert is_linked(merged.config)
    cache.release(merged)
    assert not is_linked(merged.config)
    assert merged.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in merged.model.modules())


@torch.no_grad()
@pytest.mark.parametrize("given", ["whole", "inner"])
def test_what_was_given_may_be_a_part(given):
    """The decoder alone, or the model around it: both are the same model, and know what it has taught."""
    whole = llama()
    cache = MergingDynamicCache(model=whole if given == "whole" else whole.model, compression_ratio=0.5)
    whole(prompt(500), **cache_argument(cache))
    assert cache._shared.link.memory is MergingDynamicCache(model=whole.model)._shared.link.memory
    assert cache.report().layers[0].scorer.startswith("probe")
    assert any(one.worth for one in cache._shared.link.memory.values())


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"scorer": "expected_attention"}, {"scorer": "kvzip", "merger": "drop"}])
def test_models_that_share_a_config_are_linked_one_by_one(options):
    """A student made of its teacher's config: what each is told and remembers is its own, and so is the release."""
    teacher = llama()
    torch.manual_seed(5)
    student = type(teacher)(teacher.config).eval()
    assert student.config is teacher.config
    alone = []
    for model in (copy.deepcopy(teacher), copy.deepcopy(student)):
        alone.append(linked_cache(model, **options))
        model(prompt(60), **cache_argument(alone[-1]))
    first, second = linked_cache(teacher, **options), linked_cache(student, **options)
    teacher(prompt(60), **cache_argument(first))
    first.release()
    assert is_linked(student.config)
    student(prompt(60), **cache_argument(second))
    for mine, other in zip((first, second), alone, strict=True):
        assert_same_cache(mine, other)
    second.release()
    assert not is_linked(teacher.config)


@torch.no_grad()
@pytest.mark.parametrize("inside", ["main", "thread"])
def test_a_block_lets_go_of_its_own_only(inside):
    """A cache that another thread makes in the meantime holds the model by itself, as one that was made before does."""
    model = llama()
    alone = copy.deepcopy(model)
    expected = greedy(alone, prompt(60), **cache_argument(linked_cache(alone))).sequences
    made = {}

    def make(name):
        made[name] = linked_cache(model)

    make("before")
    if inside == "thread":
        entered, leave = threading.Event(), threading.Event()

        def hold():
            with merging_attention(model):
                make("inside")
                entered.set()
                leave.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait()
        make("meanwhile")
        leave.set()
        thread.join()
    else:
        with merging_attention(model):
            make("inside")
            thread = threading.Thread(target=make, args=("meanwhile",))
            thread.start()
            thread.join()
    assert is_linked(model.config)
    for name in ("before", "meanwhile"):
        assert torch.equal(greedy(model, prompt(60), **cache_argument(made[name])).sequences, expected)
        made[name].release()
    assert not is_linked(model.config)
    model(prompt(60), **cache_argument(made["inside"]))
    with pytest.raises(ValueError, match="must see the attention"):
        model(prompt(1), **cache_argument(made["inside"]))


def test_what_nobody_holds_any_more_goes_with_the_next_release():
    models = llama(), tiny_model("qwen3")
    lost, kept = (linked_cache(model) for model in models)
    del lost
    gc.collect()
    kept.release()
    assert not any(is_linked(model.config) for model in models)


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "saved"])
def test_what_is_copied_or_saved_of_a_linked_model_is_not_linked(how, tmp_path):
    """Hooks that came along do nothing, so that the copy is linked as any other model."""
    model, fresh = llama(), llama()
    held = MergingDynamicCache(model=model, compression_ratio=0.5), linked_cache(model, scorer="kvzip")
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        torch.save(model, tmp_path / "model.pt")
        copied = torch.load(tmp_path / "model.pt", weights_only=False)
    assert not is_linked(copied.config)
    pieces = prompt(60), prompt(20, seed=7), prompt(1, seed=8)
    caches = [MergingDynamicCache(model=one, compression_ratio=0.5) for one in (copied, fresh)]
    for piece in pieces:
        outputs = [
            one(piece, **cache_argument(cache)).logits for one, cache in zip((copied, fresh), caches, strict=True)
        ]
        assert torch.equal(*outputs)
    assert_same_cache(*caches)
    for cache in held:
        cache.release()


def test_a_block_may_end_elsewhere_than_it_began():
    model, stack = llama(), contextlib.ExitStack()
    thread = threading.Thread(target=lambda: stack.enter_context(merging_attention(model)))
    thread.start()
    thread.join()
    assert is_linked(model.config)
    stack.close()
    assert not is_linked(model.config)
    with merging_attention(model), merging_attention(model):
        assert is_linked(model.config)
    assert not is_linked(model.config)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"scorer": "kvzip"}, {"scorer": "leave_one_out", "merger": "drop"}])
def test_what_a_cache_stored_goes_with_it(options):
    """Whatever was read again, and though the model stays; no collector has to find it."""
    model = llama()
    gc.collect()
    gc.disable()
    try:
        cache = MergingDynamicCache(model=model, compression_ratio=0.5, **options)
        greedy(model, prompt(60), new_tokens=2, **cache_argument(cache))
        gone = [weakref.ref(one) for one in (cache, *cache.layers, cache._shared.link)]
        del cache
        assert not [one for one in gone if one() is not None]
    finally:
        gc.enable()
