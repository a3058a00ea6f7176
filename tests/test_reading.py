"""Readings: what they fill caches with is what genuine prefills leave there, bit for bit."""

import copy
import functools

import pytest
import torch
from transformers import DynamicCache, QuantizedCache

from merging_cache import (
    BUDGETS,
    MERGERS,
    SCORERS,
    MergingConfig,
    MergingDynamicCache,
    MergingQuantizedCache,
    Reading,
    compare,
)
from merging_cache.model import cache_argument
from merging_cache.reading import Continuation, agrees, divergence, loss, predict
from models import CACHES, WINDOW, greedy, left_padded, llama, prompt, tiny_model, watch_passes
from test_product import LENGTHS, model, options
from test_query_scorers import kvzap_weights

pytestmark = pytest.mark.core

LENGTH = 48


def prefilled(made, network, inputs):
    """The cache after a genuine prefill, by `generate`, whose one token is in no cache."""
    network.generate(**inputs, **cache_argument(made), max_new_tokens=1, do_sample=False, pad_token_id=0)
    return made


def everything(cache):
    """All tensors of a cache, layer by layer."""
    found = []
    for layer in cache.layers:
        of_layer = [getattr(layer, name, None) for name in ("keys", "values", "positions", "log_mass")]
        of_layer += [getattr(layer, name, None) for name in ("num_merged", "num_dropped", "stored_per_head")]
        states = [getattr(layer, name, None) for name in ("conv_states", "recurrent_states", "ssm_states")]
        for state in states:
            of_layer += state.values() if isinstance(state, dict) else state if isinstance(state, list) else [state]
        found.append(of_layer)
    return found


def assert_same(one, other):
    """The same in every bit."""
    assert one.get_seq_length() == other.get_seq_length()
    for mine, theirs in zip(everything(one), everything(other), strict=True):
        for here, there in zip(mine, theirs, strict=True):
            assert (here is None) == (there is None)
            assert here is None or torch.equal(here, there)


def assert_goes_on_alike(network, one, other, batch=1):
    """Two more passes, of which the first folds again."""
    for length in (3, 1):
        ids = prompt(length, batch, seed=7)
        logits = [network(ids, **cache_argument(cache)).logits for cache in (one, other)]
        assert torch.equal(*logits)
    assert_same(one, other)


# What a fill gives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["dense", "fp8"])
@pytest.mark.parametrize("scorer", sorted(SCORERS))
def test_a_fill_is_a_prefill_for_every_scorer_budget_and_merger(scorer, storage, weights):
    inputs = left_padded(LENGTHS)
    reading = Reading(model(), **inputs)
    stages = [(budget, "auto") for budget in BUDGETS if budget != "auto"] + [("uniform", merger) for merger in MERGERS]
    for budget, merger in stages:
        made = []
        for _ in range(2):
            folding = options(scorer, budget, merger, weights)
            if storage == "dense":
                made.append(MergingDynamicCache(model=model(), **folding, trace=True))
            else:
                made.append(MergingQuantizedCache("fp8", model=model(), **folding, residual_length=8))
        genuine, filled = prefilled(made[0], model(), inputs), made[1]
        assert reading.fill(filled) is filled
        assert filled.layers[0].num_slots < max(LENGTHS) or budget == "threshold"
        assert_same(genuine, filled)
        if storage == "dense":
            assert torch.equal(genuine.layers[1].fates(1), filled.layers[1].fates(1))
        ids, mask = prompt(1, 2, seed=9), torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        steps = [model()(ids, attention_mask=mask, **cache_argument(cache)).logits for cache in (genuine, filled)]
        assert torch.equal(*steps)
        for cache in made:
            cache.release()


ARCHITECTURES = ["gemma3_text", "falcon_h1", "bamba", "jamba", "qwen3_next", "deepseek_v3", "phi3", "gpt2", "dory"]
ARCHITECTURES += ["glm4", "mixtral", "gpt_oss", "jetmoe"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_fill_is_a_prefill_of_every_kind_of_model(kind, attention):
    """Sliding windows, linear attention beside or instead of attention, shared keys, latent keys, loops."""
    inputs = {"input_ids": prompt(LENGTH), "attention_mask": torch.ones(1, LENGTH, dtype=torch.long)}
    try:
        network = tiny_model(kind, layers=6 if kind.startswith("gemma3") else 2, attention=attention)
        prefilled(DynamicCache(config=network.config), network, inputs)
    except Exception as error:
        pytest.skip(f"{kind} is not there or does not run with a DynamicCache: {error}")
    reading = Reading(network, **inputs)
    assert network.config.get_text_config(decoder=True)._attn_implementation == attention
    folding = {"compression_ratio": 0.5, **WINDOW}
    kinds = [
        lambda: DynamicCache(config=network.config),
        lambda: MergingDynamicCache(config=network.config, scorer="keydiff", merger="drop", **folding),
        lambda: MergingDynamicCache(config=network.config, scorer="knorm", merger="drop", fold_at="decode", **folding),
        lambda: MergingDynamicCache(model=network, scorer="snapkv", budget="adakv", **folding),
        lambda: MergingDynamicCache(model=network, scorer="expected_attention", merger="refit", **folding),
        lambda: MergingQuantizedCache("fp8", config=network.config, merger="drop", residual_length=8, **folding),
    ]
    for make in kinds:
        try:
            genuine = prefilled(make(), network, inputs)
        except ValueError:
            continue  # refused, with good reason: no fill either
        filled = reading.fill(make())
        assert_same(genuine, filled)
        if kind != "gpt2" or not isinstance(genuine, MergingDynamicCache):
            assert_goes_on_alike(network, genuine, filled)


def test_what_is_refused_of_a_prefill_is_refused_of_a_fill():
    network = tiny_model("deepseek_v3")
    reading = Reading(network, prompt(LENGTH))
    made = [MergingDynamicCache(model=network, scorer="snapkv", merger="drop", **WINDOW) for _ in range(2)]
    try:
        prefilled(made[0], network, {"input_ids": prompt(LENGTH)})
        pytest.skip("transformers before 5.5 stores the keys that this model attends to")
    except ValueError as error:
        genuine = str(error)
    with pytest.raises(ValueError, match="attends to keys") as filled:
        reading.fill(made[1])
    assert str(filled.value) == genuine


@pytest.mark.parametrize("kind", sorted(CACHES))
def test_a_reading_fills_as_often_as_one_likes(kind):
    """No cache writes into what others are filled from, or holds the memory of another."""
    network = llama()
    reading = Reading(network, prompt(LENGTH))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in reading.fill(CACHES[kind](network)).layers]
    for _ in range(2):
        cache = reading.fill(CACHES[kind](network, compression_ratio=0))
        for length in (9, 1, 1):
            network(prompt(length, seed=length), **cache_argument(cache))
        for layer in cache.layers:
            if kind == "dynamic":
                layer.keys.zero_()
    for (keys, values), layer in zip(before, reading.fill(CACHES[kind](network)).layers, strict=True):
        assert torch.equal(keys, layer.keys)
        assert torch.equal(values, layer.values)


def test_transformers_own_quantized_cache_is_filled():
    network, inputs = llama(), {"input_ids": prompt(LENGTH)}
    make = lambda: QuantizedCache("quanto", network.config, nbits=4, q_group_size=16, residual_length=16)  # noqa: E731
    pytest.importorskip("optimum.quanto")
    genuine, filled = prefilled(make(), network, inputs), Reading(network, **inputs).fill(make())
    step = prompt(1, seed=3)
    assert torch.equal(*(network(step, **cache_argument(cache)).logits for cache in (genuine, filled)))


@pytest.mark.parametrize("chunk_size", [7, 16, 48, 100])
@pytest.mark.parametrize("scorer", ["keydiff", "snapkv", "expected_attention", "observed_attention"])
def test_a_context_read_in_chunks_folds_as_in_chunks(scorer, chunk_size):
    """What the chunks themselves leave where the fold waits for the first single token."""
    network, ids = llama(), prompt(LENGTH)
    folding = {"scorer": scorer, "compression_ratio": 0.5, "fold_at": "decode", **WINDOW}
    genuine, filled = (MergingDynamicCache(model=network, **folding) for _ in range(2))
    with torch.no_grad():
        for chunk in ids.split(chunk_size, dim=1):
            network(chunk, **cache_argument(genuine))
        Reading(network, ids, chunk_size=chunk_size).fill(filled)
        step = prompt(1, seed=3)
        logits = [network(step, **cache_argument(cache)).logits for cache in (genuine, filled)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(genuine.layers, filled.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions)
    whole = Reading(network, ids).logits
    torch.testing.assert_close(Reading(network, ids, chunk_size=chunk_size).logits, whole, rtol=1e-4, atol=1e-4)


def test_what_is_read_again_alike_is_read_once(monkeypatch):
    """By all caches of a reading that ask the same of it; what is asked otherwise, or packed, is read by itself."""
    network = llama()
    reading = Reading(network, prompt(LENGTH))
    passes = watch_passes(monkeypatch, network)

    def passes_of(kind=MergingDynamicCache, **folding):
        passes.clear()
        cache = reading.fill(kind(model=network, **folding))
        cache.release()
        return len(passes)

    quantized = functools.partial(MergingQuantizedCache, "fp8")
    assert passes_of(scorer="kvzip", compression_ratio=0.5) == 1
    assert passes_of(scorer="kvzip", compression_ratio=0.75, merger="drop", budget="uniform") == 0
    assert 0 < reading._known.seconds_saved < reading.fill_seconds  # as if it had been read again
    assert passes_of(scorer="leave_one_out", compression_ratio=0.5) == 1
    assert passes_of(scorer={"name": "kvzip", "chunk_size": 16}, compression_ratio=0.5) == 3
    assert passes_of(scorer={"name": "kvzip", "plus": True}, compression_ratio=0.5) == 1
    assert passes_of(scorer="kvzip", budget="profile", compression_ratio=0.5) == 1
    assert passes_of(kind=quantized, scorer="kvzip", compression_ratio=0.5) == 1
    assert passes_of(scorer="leave_one_out", compression_ratio=0.9, merger="refit") == 0


def test_a_reading_leaves_the_model_as_it_was():
    network = llama()
    hooks = [len(module._forward_pre_hooks) for module in network.modules()]
    reading = Reading(network, prompt(LENGTH))
    assert network.config._attn_implementation == "sdpa"
    assert [len(module._forward_pre_hooks) for module in network.modules()] == hooks
    expected = greedy(network, prompt(LENGTH), new_tokens=1).logits[0]
    assert torch.equal(reading.logits, expected)
    cache = MergingDynamicCache(model=network, scorer="snapkv", **WINDOW)
    Reading(network, prompt(LENGTH, seed=1))  # another cache's link outlives the reading
    assert network.config._attn_implementation == "merging_sdpa"
    cache.release()


def test_a_reading_says_what_it_holds():
    network = llama()
    states = 2 * LENGTH * (2 * 2 + 4) * 16 * 4  # layers, tokens, KV heads twice and query heads, dimensions, bytes
    hidden = 2 * LENGTH * network.config.hidden_size * 4
    assert Reading(network, prompt(LENGTH)).nbytes == states + hidden
    assert Reading(network, prompt(LENGTH), hidden_states=False).nbytes == states


def test_embeddings_are_read_as_well():
    network = llama()
    embeddings = network.get_input_embeddings()(prompt(LENGTH)).detach()
    filled = Reading(network, inputs_embeds=embeddings).fill(CACHES["dynamic"](network))
    assert_same(prefilled(CACHES["dynamic"](network), network, {"inputs_embeds": embeddings}), filled)


# What is refused ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_filled_or_read_is_refused(tmp_path):
    network = llama()
    reading = Reading(network, prompt(LENGTH), hidden_states=False)
    cache = reading.fill(CACHES["dynamic"](network))
    with pytest.raises(ValueError, match="the cache is not empty: a reading fills a new one"):
        reading.fill(cache)
    cache.reset()
    reading.fill(cache)
    with pytest.raises(ValueError, match="made for another model than the LlamaForCausalLM"):
        reading.fill(MergingDynamicCache(config=llama(layers=3).config))
    with pytest.raises(TypeError, match="cache is list; give a cache of transformers"):
        reading.fill([])
    kvzap_weights(tmp_path, "mlp")
    with pytest.raises(
        ValueError, match="the cache looks at hidden states, and none were kept; read with hidden_states=True"
    ):
        reading.fill(MergingDynamicCache(model=network, scorer={"name": "kvzap", "weights": str(tmp_path)}, **WINDOW))
    with pytest.raises(ValueError, match="the cache has 3 layers, and the model that has read 2"):
        reading.fill(DynamicCache(config=llama(layers=3).config))
    for nothing in (None, prompt(0)):
        with pytest.raises(ValueError, match="there is nothing to read: give input_ids of shape"):
            Reading(network, nothing)
    for wrong, came in ((prompt(9)[0], r"a tensor of shape \(9,\)"), ([[1, 2]], "list"), ("text", "str")):
        with pytest.raises(TypeError, match=f"input_ids is {came}; give ids of shape"):
            Reading(network, wrong)
    with pytest.raises(TypeError, match="model is str; give a transformers model"):
        Reading("smollm2", prompt(LENGTH))
    with pytest.raises(TypeError, match="max_new_tokens is given, but a reading decides that by itself"):
        Reading(network, prompt(LENGTH), max_new_tokens=5)
    with pytest.raises(ValueError, match=r"attention_mask is of shape \(1, 3\); it must be \(1, 48\)"):
        Reading(network, prompt(LENGTH), torch.ones(1, 3))
    with pytest.raises(ValueError, match="the context has 9999 tokens, but LlamaForCausalLM allows at most 512"):
        Reading(network, prompt(9999))
    with pytest.raises(ValueError, match="chunk_size is 0"):
        Reading(network, prompt(LENGTH), chunk_size=0)
    assert network.config._attn_implementation in ("sdpa", "merging_sdpa")


# What follows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folds", [False, True])
def test_continuations_are_those_of_the_tokens_one_by_one(folds):
    """Of two padded rows, asked three things of different lengths in one pass, against a cache each."""
    network, inputs = llama(), left_padded(LENGTHS)
    folding = {"scorer": "keydiff", "max_tokens": 16, **WINDOW} if folds else {"compression_ratio": 0}
    cache = Reading(network, **inputs).fill(MergingDynamicCache(model=network, **folding))
    tokens = prompt(40, seed=5)[0].tolist()
    asked = [Continuation(tokens[:3], tokens[3:9], 1), Continuation(tokens[9:10], tokens[10:12], 0)]
    asked.append(Continuation(tokens[12:20], tokens[20:21], 1))
    before = everything(cache)
    found = predict(network, cache, asked, inputs["attention_mask"], batch=2)
    for one, there in zip(asked, found, strict=True):
        row = inputs["input_ids"][one.row : one.row + 1, max(LENGTHS) - LENGTHS[one.row] :]
        alone = Reading(network, row).fill(MergingDynamicCache(model=network, **folding))
        with torch.no_grad():
            logits = [network(torch.tensor([[t]]), **cache_argument(alone)).logits[0, 0] for t in one.fed]
        expected = torch.stack(logits[-len(one.predicted) :]).log_softmax(-1)
        torch.testing.assert_close(there, expected, rtol=1e-4, atol=1e-4)
        assert loss(there, one.predicted) == pytest.approx(
            torch.nn.functional.cross_entropy(expected, torch.tensor(one.predicted)).item(), abs=1e-4
        )
        assert divergence(there, expected) == pytest.approx(0, abs=1e-5)
        assert agrees(there, there.argmax(-1).tolist())
        assert not agrees(there, [(token + 1) % 97 for token in there.argmax(-1).tolist()])
    for mine, theirs in zip(before, everything(cache), strict=True):  # the cache is as it was
        assert all(one is None or torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    with pytest.raises(ValueError, match="a continuation has 0 tokens that are given and 1 to predict"):
        Continuation([], [3])
    cache.release()


# Comparing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [None, prompt(5, seed=8)])
def test_compare_is_what_each_cache_loses_by_itself(question):
    network, text = llama(), prompt(64)
    read, follows = text[:, :48], text[:, 48:]
    configs = [
        {"scorer": "keydiff", "compression_ratio": 0.5, **WINDOW},
        MergingConfig(scorer="snapkv", merger="drop", compression_ratio=0.75, **WINDOW),
        MergingQuantizedCache("fp8", model=network, compression_ratio=0.5, **WINDOW),
        DynamicCache(config=network.config),
    ]
    found = compare(network, read, configs, question=question, following=follows, progress=False)
    window = " sink_tokens=2 recent_tokens=6"
    names = ["full cache", f"keydiff auto 50%{window}", f"snapkv drop 75%{window}"]
    names += [f"default auto 50%{window} fp8", "DynamicCache"]
    assert [one.name for one in found.caches] == names
    full, first, *_, again = found.caches
    assert (again.loss, again.divergence, again.agreement, again.share) == (full.loss, 0, 1, 1)
    asked = follows if question is None else torch.cat([question, follows], dim=1)
    logits = []
    for cache in (DynamicCache(config=network.config), MergingDynamicCache(model=network, merging=configs[0])):
        with torch.no_grad():
            network(read, **cache_argument(cache))
            if isinstance(cache, MergingDynamicCache):
                cache.activate_past_recording()
                assert first.nbytes == cache.report().total.bytes_now
            logits.append(network(asked[:, :-1], **cache_argument(cache)).logits[0].log_softmax(-1))
    predicted = asked[0, -found.predicted :]
    assert found.predicted == (15 if question is None else 16)
    for one, here in zip((full, first), logits, strict=True):
        expected = -here[-found.predicted :].gather(1, predicted[:, None]).mean().item()
        assert one.loss == pytest.approx(expected, abs=1e-4)
    assert first.divergence == pytest.approx(
        divergence(*(one[-found.predicted :] for one in reversed(logits))), abs=1e-4
    )
    lines = str(found).splitlines()
    assert lines[0] == f"48 tokens read, then {found.predicted} that follow"
    assert len(lines) == 4 + 5
    assert network.config._attn_implementation in ("sdpa", "merging_sdpa")


def test_compare_folds_what_would_wait():
    network, text = llama(), prompt(80)
    configs = [{"compression_ratio": 0.5, "fold_at": when, **WINDOW} for when in ("prefill", "decode")]
    found = compare(network, text[:, :60], [*configs, configs[0]], following=text[:, 60:], progress=False)
    _, one, other, again = found.caches
    assert (one.loss, one.nbytes) == (other.loss, other.nbytes)
    assert one.divergence > 0
    names = [f"default auto 50% sink_tokens=2 recent_tokens=6 ({number})" for number in (1, 2)]
    assert [one.name, again.name] == names
    assert other.name.endswith("fold_at=decode")
    used = MergingDynamicCache(config=network.config)
    network(text, **cache_argument(used))
    with pytest.raises(ValueError, match="a MergingDynamicCache to compare is not empty"):
        compare(network, text[:, :60], [used], following=text[:, 60:], progress=False)
    network.generation_config.eos_token_id = list(range(97))
    with pytest.raises(ValueError, match="the full cache answers this prompt with nothing"):
        compare(network, text, configs, progress=False)


def test_compare_takes_the_full_caches_own_answer():
    network, read = llama(), prompt(48)
    found = compare(network, read, [{"compression_ratio": 0.5}], max_new_tokens=9, progress=False)
    output = network.generate(read, max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert found.answer == " ".join(map(str, output[0, 48:].tolist()))
    assert found.caches[0].agreement == 1
    assert found.predicted == 8  # the first comes of the prefill, which is the same for all caches
    assert "the full cache's own answer" in str(found)


def test_compare_says_what_is_wrong(monkeypatch):
    """Before anything is read."""
    network, read = llama(), prompt(48)
    one = [{"compression_ratio": 0.5}]
    monkeypatch.setattr(type(network), "forward", lambda *args, **options: pytest.fail("it was read"))
    for arguments, more, error, complaint in [
        ((read, []), {}, TypeError, r"configs is \[\]; give a list"),
        ((read, {"scorer": "knorm"}), {}, TypeError, "configs is {'scorer': 'knorm'}; give a list"),
        ((read, [{"scorer": "no"}]), {}, ValueError, "unknown scorer 'no'"),
        ((read, ["keydiff"]), {}, ValueError, "merging is 'keydiff', the name of a scorer .* give scorer='keydiff'"),
        ((read, [3]), {}, TypeError, "configs holds 3; give a MergingConfig"),
        (("text", one), {}, ValueError, "there is no tokenizer at '', where the model came from; give tokenizer="),
        ((prompt(3, 2), one), {}, TypeError, r"prompt is a tensor of shape \(2, 3\); give a text, messages or ids"),
        ((prompt(0), one), {}, ValueError, "prompt is empty"),
        ((read, one), {"following": prompt(1)}, ValueError, "what follows is a single token"),
        ((read, one), {"following": 5}, TypeError, "following is 5; give a text or ids"),
        ((read, one), {"max_new_tokens": 1}, ValueError, "max_new_tokens is 1"),
        (
            (read, one),
            {"following": prompt(500)},
            ValueError,
            "has 548 tokens, but LlamaForCausalLM allows at most 512",
        ),
        ((read, [CACHES["dynamic"](network), copy.copy(read)]), {}, TypeError, "configs holds tensor"),
    ]:
        with pytest.raises(error, match=complaint):
            compare(network, *arguments, progress=False, **more)
