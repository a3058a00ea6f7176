"""The attention link: pass-through, queries that arrive, masks that fit ragged layers, and what happens without it."""

import contextlib
import copy
import gc
import json
import math
import pickle
import threading
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from architectures import tiny_model
from merging_cache import MergingDynamicCache, MergingQuantizedCache, Scorer, merging_attention
from merging_cache.mergers import DropMerger
from merging_cache.model import attention, cache_argument
from merging_cache.model.attention import LinkedName
from merging_cache.model.link import is_linked
from models import WINDOW, assert_same_cache, greedy, left_padded, llama, prompt, score_by_hand

pytestmark = pytest.mark.core
RAGGED = {
    "adakv": "adakv",
    "global": "global",
    "pyramid": "pyramid",
    "per_layer": {"name": "per_layer", "weights": [1, 3]},
    "threshold": {"name": "threshold", "threshold": -0.3, "window": 8},
}


class Listener(Scorer):
    """Keeps what it is shown."""

    needs_queries = True
    query_window = 7

    def __init__(self):
        self.shown = []

    def score(self, states):
        self.shown.append(states)
        return states.keys.norm(dim=-1)


def linked(model, quantized=False, **options):
    if quantized:
        return MergingQuantizedCache("fp8", model=model, **{"residual_length": 16} | WINDOW | options)
    return MergingDynamicCache(model=model, **WINDOW | options)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_leaves_the_process_is_not_linked(attention, tmp_path):
    """Saved, pickled and copied models name their attention as if they had never been linked, and run so."""
    model, ids = llama(attention), prompt(12)
    expected = model(ids).logits
    with merging_attention(model):
        assert is_linked(model.config)
        model.save_pretrained(tmp_path)
        left = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
        assert torch.equal(model(ids).logits, expected)
    assert "merging_" not in (tmp_path / "config.json").read_text()
    for other in left:
        assert type(other.config._attn_implementation) is str
        assert other.config._attn_implementation == attention
        assert torch.equal(other(ids).logits, expected)
    assert type(model.config._attn_implementation) is str


def test_a_linked_name_is_the_name_but_for_where_it_is_looked_up():
    name, others = LinkedName("sdpa"), {"sdpa": 1, "merging_sdpa": 2, "eager": 3}
    assert others[name] == 2
    assert name == "sdpa" == name
    assert name == "merging_sdpa"
    assert name not in ("eager", "merging_eager")
    assert (name != "sdpa", name != "eager") == (False, True)
    assert json.dumps([name, f"{name}"]) == '["sdpa", "sdpa"]'


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("inputs", [prompt(40), left_padded([40, 17, 3])], ids=["plain", "padded"])
def test_other_caches_pass_through_bit_for_bit(attention, inputs):
    model = llama(attention)
    expected = greedy(model, inputs, **cache_argument(DynamicCache(config=model.config)))
    with merging_attention(model):
        assert model.config._attn_implementation == f"merging_{attention}"
        linked_output = greedy(model, inputs, **cache_argument(DynamicCache(config=model.config)))
    assert model.config._attn_implementation == attention
    assert torch.equal(expected.sequences, linked_output.sequences)
    for mine, theirs in zip(linked_output.logits, expected.logits, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_linked_cache_without_need_is_the_unlinked_one(attention):
    model, inputs = llama(attention), left_padded([40, 17, 3])
    mask = inputs["attention_mask"]
    options = {"scorer": "keydiff", "merger": "similarity", "budget": "uniform"} | WINDOW
    unlinked = MergingDynamicCache(config=model.config, attention_mask=mask, **options)
    expected = greedy(model, inputs, **cache_argument(unlinked))
    cache = linked(model, **options)  # it learns the padding by itself
    output = greedy(model, inputs, **cache_argument(cache))
    assert torch.equal(output.sequences, expected.sequences)
    for mine, theirs in zip(cache.layers, unlinked.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions)
        assert torch.equal(mine.values, theirs.values)


def test_release_counts_the_caches_and_the_blocks():
    model = llama()
    one, two = linked(model), linked(model)
    one.release(model)
    assert model.config._attn_implementation == "merging_sdpa"
    two.release(model)
    assert model.config._attn_implementation == "sdpa"
    with merging_attention(model):
        cache = linked(model)
        cache.release(model)
        assert model.config._attn_implementation == "merging_sdpa"
    assert model.config._attn_implementation == "sdpa"
    with merging_attention(model), pytest.raises(RuntimeError):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fold_at", ["prefill", "decode"])
@pytest.mark.parametrize("chunk", [None, 16])
def test_the_last_queries_arrive_however_the_prompt_comes(fold_at, chunk):
    model, ids = llama(), prompt(40)
    seen = true_queries(model, ids)
    scorer = Listener()
    cache = linked(model, scorer=scorer, fold_at=fold_at)
    greedy(model, ids, new_tokens=2, **cache_argument(cache), prefill_chunk_size=chunk)
    last = {states.layer_idx: states for states in scorer.shown}
    for index, states in last.items():
        assert states.query_positions.tolist() == [list(range(33, 40))]
        if fold_at == "decode" or (chunk is None or index == 0):  # later layers see what the fold left of earlier ones
            torch.testing.assert_close(states.queries, seen[index][:, :, -7:], rtol=1e-4, atol=1e-4)
        assert states.module is model.model.layers[index].self_attn
        assert states.scaling == model.model.layers[index].self_attn.scaling
    assert all(layer._observed.queries.shape[2] == 7 for layer in cache.layers)  # never all of them


@torch.no_grad()
def true_queries(model, ids):
    """What every attention module hands to the attention function."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    seen = {}

    def record(module, query, *args, **kwargs):
        seen[module.layer_idx] = query
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("recording", record)
    AttentionMaskInterface.register("recording", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("recording")
    model(ids, **cache_argument(DynamicCache(config=model.config)))
    model.set_attn_implementation(before)
    return seen


def test_padding_has_no_queries():
    model, scorer = llama(), Listener()
    greedy(model, left_padded([40, 4]), new_tokens=2, **cache_argument(linked(model, scorer=scorer, max_tokens=20)))
    shown = [states for states in scorer.shown if states.layer_idx == 0]
    # the short row keeps everything and is not scored
    assert [states.query_positions.tolist() for states in shown] == [[list(range(33, 40))]]


@pytest.mark.parametrize("quantized", [False, True], ids=["dynamic", "fp8"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", RAGGED)
def test_ragged_attention_is_that_of_each_head_alone(budget, attention, quantized):
    """One and several query tokens, equal to a loop over heads that attend to their own survivors."""
    model = llama(attention)
    cache = linked(model, quantized, budget=RAGGED[budget], scorer="snapkv", merger="similarity")
    if budget == "threshold":
        cache = linked(model, quantized, budget=RAGGED[budget], scorer="keydiff", merger="similarity")
    ids = prompt(60, batch=2)
    model(ids, **cache_argument(cache))
    counts = [layer.slots_per_head for layer in cache.layers]
    assert len({int(n) for count in counts for n in count.flatten()}) > 1
    for length in (1, 5):
        expected = heads_alone(model, prompt(length, batch=2, seed=length), copy.deepcopy(cache))
        logits = model(prompt(length, batch=2, seed=length), **cache_argument(copy.deepcopy(cache))).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def heads_alone(model, ids, cache):
    """The logits of new tokens, by hand: every head attends to what it stores and to the new tokens before."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    inner, length = model.model, ids.shape[1]
    hidden = inner.embed_tokens(ids)
    positions = torch.arange(cache.get_seq_length(), cache.get_seq_length() + length)[None]
    cos, sin = inner.rotary_emb(hidden, positions)
    for block, layer in zip(inner.layers, cache.layers, strict=True):
        attention, normed = block.self_attn, block.input_layernorm(hidden)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        out = torch.zeros_like(q)
        groups = q.shape[1] // k.shape[1]
        for row in range(q.shape[0]):
            for head in range(q.shape[1]):
                kv = head // groups
                mine = layer.positions[row, kv] >= 0
                keys = torch.cat([layer.keys[row, kv, mine], k[row, kv]])
                mass = torch.zeros(len(keys))
                if layer.log_mass is not None:
                    mass[: -k.shape[2]] = layer.log_mass[row, kv, mine]
                values = torch.cat([layer.values[row, kv, mine], v[row, kv]])
                for t in range(length):
                    visible = len(keys) - length + t + 1
                    weights = (keys[:visible] @ q[row, head, t] * attention.scaling + mass[:visible]).softmax(0)
                    out[row, head, t] = weights @ values[:visible]
        hidden = hidden + attention.o_proj(out.transpose(1, 2).flatten(2))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return model.lm_head(inner.norm(hidden))


@pytest.mark.parametrize("quantized", [False, True], ids=["dynamic", "fp8"])
@pytest.mark.parametrize("budget", RAGGED)
@pytest.mark.parametrize("merger", ["drop", "similarity"])
def test_ragged_rows_equal_the_row_alone(budget, merger, quantized):
    model = llama()
    scorer = "keydiff" if budget == "threshold" else "snapkv"
    options = {"budget": RAGGED[budget], "merger": merger, "scorer": scorer, "max_tokens": 20}
    lengths = [50, 31, 12]
    inputs = left_padded(lengths)
    together = greedy(model, inputs, **cache_argument(linked(model, quantized, **options)))
    for row, length in enumerate(lengths):
        if quantized and length <= 20:
            continue  # alone it is not folded, so it is not quantized either
        alone = greedy(
            model, inputs["input_ids"][row : row + 1, -length:], **cache_argument(linked(model, quantized, **options))
        )
        for mine, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], rtol=1e-4, atol=1e-3 if quantized else 1e-4)


@pytest.mark.parametrize("budget", RAGGED)
def test_ragged_bytes_follow_the_slots(budget):
    """At most 1.05 times what the kept slots take, positions included, by the storage that is allocated."""
    model = llama()
    scorer = "keydiff" if budget == "threshold" else "snapkv"
    cache = linked(model, budget=RAGGED[budget], scorer=scorer, compression_ratio=0.6)
    model(prompt(400), **cache_argument(cache))
    slots = sum(int(layer.slots_per_head.sum()) for layer in cache.layers)
    per_slot = 2 * 16 * 4 + 4
    storages = {}
    for layer in cache.layers:
        for tensor in tensors_of(layer):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    held = sum(storages.values())
    observed = sum(layer._observed.nbytes for layer in cache.layers)
    assert held - observed <= 1.05 * slots * per_slot
    assert cache.report().total.bytes_now == pytest.approx(held, rel=0.01)


def tensors_of(thing, seen=None):
    """All tensors that an object holds, however deep, the model's own left out."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (torch.nn.Module, str, bytes, type)):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from tensors_of(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from tensors_of(value, seen)
    elif hasattr(thing, "__dict__") and not callable(thing):
        yield from tensors_of(vars(thing), seen)


@pytest.mark.parametrize("budget", RAGGED)
def test_beams_and_reordered_rows_of_ragged_caches(budget):
    model = llama()
    scorer = "keydiff" if budget == "threshold" else "snapkv"
    options = {"budget": RAGGED[budget], "scorer": scorer}
    ids = prompt(50, batch=2)
    cache = linked(model, **options)
    model(ids, **cache_argument(cache))
    before = [(layer.positions, layer.keys, layer.values) for layer in cache.layers]
    order = torch.tensor([1, 1, 0])
    cache.batch_select_indices(order)
    for layer, (positions, keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.positions, positions[order])
        assert torch.equal(layer.keys, keys[order])
        assert torch.equal(layer.values, values[order])
    beams = greedy(
        model, ids, **cache_argument(linked(model, **options)), num_beams=3, output_logits=False, output_scores=True
    )
    # the score of the best beam is that of its tokens fed one by one
    for row in range(2):
        total = score_by_hand(model, linked(model, **options), ids[row : row + 1], beams.sequences[row, 50:])
        assert beams.sequences_scores[row].item() == pytest.approx(total / 8, abs=1e-4)


@pytest.mark.parametrize("budget", ["uniform", *RAGGED])
def test_drafts_leave_no_trace(budget):
    """Prompt lookup ends with the cache of the accepted tokens fed by hand, folded at the same point."""
    model = llama()
    scorer = "keydiff" if budget == "threshold" else "snapkv"
    options = {"budget": RAGGED.get(budget, budget), "scorer": scorer, "fold_at": "decode"}
    ids = prompt(20).repeat(1, 3)
    cache = linked(model, **options)
    if not hasattr(DynamicCache, "activate_past_recording"):
        cache.activate_past_recording()  # this transformers does not announce drafts
    output = greedy(model, ids, **cache_argument(cache), prompt_lookup_num_tokens=3, output_logits=False)
    by_hand = linked(model, **options)
    model(ids, **cache_argument(by_hand))
    for token in output.sequences[0, 60 : cache.get_seq_length()]:
        model(token.view(1, 1), **cache_argument(by_hand))
    for mine, theirs in zip(cache.layers, by_hand.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"scorer": "snapkv"}, {"budget": "adakv"}], ids=["scorer", "budget"])
def test_without_the_model_the_first_single_token_says_so(options):
    model = llama()
    cache = MergingDynamicCache(config=model.config, **options)
    logits = model(prompt(40), **cache_argument(cache)).logits
    assert torch.equal(logits, model(prompt(40)).logits)
    name = "SnapKVScorer" if "scorer" in options else "AdaKVBudget"
    with pytest.raises(ValueError, match=rf"{name} must see the attention of Llama\w*, .* Give the cache the model"):
        model(prompt(1), **cache_argument(cache))


def test_a_model_outside_the_interface_is_refused():
    model = tiny_model("xglm", attention="eager")
    with pytest.raises(ValueError, match="the attention of XGLMForCausalLM does not go through"):
        MergingDynamicCache(model=model, scorer="snapkv")
    with (
        pytest.raises(ValueError, match="the attention of XGLMForCausalLM does not go through"),
        merging_attention(model),
    ):
        pass
    cache = MergingDynamicCache(model=model, scorer="keydiff", **WINDOW)  # keys and values are enough for this one
    model(prompt(40), **cache_argument(cache))
    assert cache.layers[0].num_slots == 20


def test_bad_models():
    with pytest.raises(TypeError, match="model is str"):
        MergingDynamicCache(model="llama")
    model = llama()
    with pytest.raises(ValueError, match="config and model are both given"):
        MergingDynamicCache(config=llama().config, model=model)


def test_copies_and_pickles_leave_the_model_behind():
    model = llama()
    cache = linked(model, scorer="snapkv")
    model(prompt(40), **cache_argument(cache))
    twin, thawed = copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))
    assert twin.layers[0]._observed.owner.module is model.model.layers[0].self_attn
    assert thawed.layers[0]._observed.owner.module is None
    assert len(pickle.dumps(cache)) < 200_000
    for other in (twin, thawed):
        assert torch.equal(
            model(prompt(1), **cache_argument(other)).logits,
            model(prompt(1), **cache_argument(copy.deepcopy(cache))).logits,
        )
    other = None
    gc.collect()  # the copies made just above
    cache.release(model)
    assert model.config._attn_implementation == "merging_sdpa"  # a copy has to be released by itself
    twin.release()
    assert model.config._attn_implementation == "sdpa"
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None  # although the caches live on


def test_what_is_refused_leaves_no_model_linked():
    model = llama()
    mistakes = [{"attention_mask": torch.ones(4)}, {"scorer": "none"}, {"trace": 1}, {"compression_ratio": 2}]
    for mistake in mistakes:
        with pytest.raises((ValueError, TypeError)):
            MergingDynamicCache(model=model, **mistake)
        assert model.config._attn_implementation == "sdpa"
    model = tiny_model("jetmoe")
    for how in ({"budget": "adakv"}, {"merger": "mass"}):
        with pytest.raises(ValueError, match="jetmoe attends to every stored head several times"):
            MergingDynamicCache(model=model, **how)
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("scorer", ["observed_attention", "expected_attention", "keydiff"])
@pytest.mark.parametrize("merger", ["drop", "mass"])
@torch.no_grad()
def test_a_refused_pass_leaves_nothing(scorer, merger):
    """Values that are not numbers refuse the fold; the next prompt finds the layer as it was."""
    model = llama(layers=1)
    caches = [linked(model, scorer=scorer, merger=merger) for _ in range(2)]
    weight = model.model.layers[0].self_attn.v_proj.weight
    number = weight[0, 0].item()
    weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="non-finite values"):
        model(prompt(40, seed=1), **cache_argument(caches[0]))
    weight[0, 0] = number
    assert caches[0].get_seq_length() == 0
    for cache in caches:
        model(prompt(40, seed=2), **cache_argument(cache))
    assert_same_cache(*caches)
    for cache in caches:
        cache.release()


def test_two_threads_with_two_caches_on_one_model():
    """Links come and go while another thread generates."""
    model, outputs = llama(), {}

    def work(seed, times=5):
        for _ in range(times):
            cache = linked(model, scorer="snapkv", budget="adakv")
            outputs.setdefault(seed, []).append(greedy(model, prompt(40, seed=seed), **cache_argument(cache)).sequences)
            cache.release()

    for seed in (1, 2):
        work(seed, times=1)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        assert len(outputs[seed]) == 6
        assert all(torch.equal(sequences, outputs[seed][0]) for sequences in outputs[seed])
    assert model.config._attn_implementation == "sdpa"


# The link's life ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["released", "after the block", "another implementation"])
def test_ragged_slots_need_the_link_to_the_end(how):
    model = llama()
    with contextlib.ExitStack() as stack:
        if how == "after the block":
            stack.enter_context(merging_attention(model))
            cache = MergingDynamicCache(config=model.config, budget="adakv", **WINDOW)
        else:
            cache = linked(model, budget="adakv")
        model(prompt(40), **cache_argument(cache))
    if how == "released":
        cache.release()
    elif how == "another implementation":
        model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"only the linked attention of Llama\w* can read .* not linked any more"):
        model(prompt(1), **cache_argument(cache))
    assert cache.get_seq_length() == 40  # and nothing was stored
    with merging_attention(model):
        model(prompt(1), **cache_argument(cache))


@pytest.mark.parametrize("options", [{"budget": "adakv", "merger": "similarity"}, {"merger": "count"}])
@pytest.mark.parametrize("how", ["thawed", "another model"])
def test_slots_that_nobody_reads_stop_the_pass(how, options):
    """A cache that cannot know which model runs it sees it at the second layer."""
    model = llama()
    cache = linked(model, **options)
    model(prompt(40), **cache_argument(cache))
    other = pickle.loads(pickle.dumps(cache)) if how == "thawed" else cache
    runs = llama() if how == "another model" else model
    if how == "thawed":
        cache.release()
    with pytest.raises(ValueError, match=r"(AdaKVBudget|CountMerger) must see the attention of"):
        runs(prompt(1), **cache_argument(other))


def test_rows_that_hold_nothing_yet_can_be_selected():
    model, inputs = llama(), left_padded([30, 10])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    cache = linked(model, budget="adakv", max_tokens=12)
    model(ids[:, :16], attention_mask=mask[:, :16], position_ids=position_ids[:, :16], **cache_argument(cache))
    cache.batch_select_indices(torch.tensor([1]))
    rest = {"attention_mask": mask[1:], "position_ids": position_ids[1:, 16:]}
    logits = model(ids[1:, 16:], **cache_argument(cache), **rest).logits
    alone = linked(model, budget="adakv", max_tokens=12)
    expected = model(ids[1:, 20:], **cache_argument(alone)).logits
    torch.testing.assert_close(logits[:, 4:], expected, rtol=1e-4, atol=1e-4)


def test_a_choice_made_meanwhile_is_kept():
    model = llama()
    cache = linked(model)
    model.set_attn_implementation("eager")
    cache.release()
    assert model.config._attn_implementation == "eager"


def test_whole_and_inner_model_share_one_link():
    model = llama()
    one, two = linked(model), linked(model.model)
    assert model.config._attn_implementation == "merging_sdpa"
    one.release()
    assert model.config._attn_implementation == "merging_sdpa"
    two.release()
    assert model.config._attn_implementation == "sdpa"


def test_a_copied_model_can_be_linked_by_itself():
    model = llama()
    cache = linked(model)
    twin = copy.deepcopy(model)
    other = linked(twin)
    assert twin.config._attn_implementation == "merging_sdpa"
    other.release(twin)
    assert (twin.config._attn_implementation, model.config._attn_implementation) == ("sdpa", "merging_sdpa")
    with pytest.raises(ValueError, match="linked to a LlamaForCausalLM, not to the LlamaForCausalLM given"):
        cache.release(twin)
    cache.release(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_refused_model_is_left_alone():
    model = tiny_model("deepseek_v3")
    with pytest.raises(ValueError, match="multi-head latent attention"):
        MergingDynamicCache(model=model)
    assert not model.config._attn_implementation.startswith("merging_")


def test_hidden_states_are_not_kept(tmp_path):
    from test_query_scorers import kvzap_weights

    kvzap_weights(tmp_path / "w", "linear")
    model = llama()
    cache = linked(model, scorer={"name": "kvzap", "weights": str(tmp_path / "w")})
    model(prompt(40))
    assert attention._thread.hidden_states is None
    model(prompt(40), **cache_argument(cache))
    assert attention._thread.hidden_states is None
    assert all(layer._observed.hidden_states is None for layer in cache.layers)
    model.set_attn_implementation("eager")
    other = linked(model, scorer={"name": "kvzap", "weights": str(tmp_path / "w")})
    cache.release()
    other.release()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(layer._observed.owner.module is None for layer in cache.layers)


def test_a_fold_that_fails_takes_the_pass_back():
    def broken(states):
        raise RuntimeError("no score today")

    model = llama()
    cache = linked(model, scorer=broken)
    with pytest.raises(RuntimeError, match="no score today"):
        model(prompt(40), **cache_argument(cache))
    assert cache.layers[0].num_stored == cache.layers[0].seen == 0


# Layers and padding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1, 3], [3, 1]])
@pytest.mark.parametrize("lengths", [[40, 17], [40, 5], [40]])
def test_layers_that_keep_everything_beside_layers_that_fold(weights, lengths):
    """Two turns, each row equal to the row alone: a layer whose part is all its tokens gets rid of padding, too."""
    model, inputs = llama(), left_padded(lengths)
    options = {"budget": {"name": "per_layer", "weights": weights}, "max_tokens": 30, "scorer": "snapkv"}
    together, alone = linked(model, **options), [linked(model, **options) for _ in lengths]
    text, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(2):
        output = greedy(model, {"input_ids": text, "attention_mask": mask}, 3, **cache_argument(together))
        for row, (cache, length) in enumerate(zip(alone, lengths, strict=True)):
            single = greedy(model, text[row : row + 1, max(lengths) - length :], 3, **cache_argument(cache))
            for mine, theirs in zip(output.logits, single.logits, strict=True):
                torch.testing.assert_close(mine[row], theirs[0], rtol=1e-4, atol=1e-4)
        text = torch.cat([output.sequences, prompt(9, len(lengths), seed=5)], 1)
        mask = torch.cat([mask, torch.ones(len(lengths), text.shape[1] - mask.shape[1], dtype=torch.long)], 1)


class Doubling(DropMerger):
    """Every slot draws attention for two, so the answer is that of the same slots stored twice."""

    has_mass = True

    def merge(self, states, survivors):
        slots = super().merge(states, survivors)
        return replace(slots, log_mass=torch.full(slots.positions.shape, math.log(2.0)))


@pytest.mark.parametrize("budget", ["uniform", "adakv", "global"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mass_is_added_to_the_logits(budget, attention):
    model = llama(attention)
    cache = linked(model, budget=budget, scorer="snapkv", merger=Doubling())
    model(prompt(60, batch=2), **cache_argument(cache))
    for length in (1, 5):
        ids = prompt(length, batch=2, seed=length)
        expected = heads_alone(model, ids, copy.deepcopy(cache))
        torch.testing.assert_close(
            model(ids, **cache_argument(copy.deepcopy(cache))).logits, expected, rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize("scorer", ["snapkv", "tova", {"name": "snapkv", "window_size": 8}, "observed_attention"])
@pytest.mark.parametrize("budget", ["uniform", "adakv", "global"])
def test_right_padded_rows_equal_the_row_alone(scorer, budget):
    """The query window of a row is that of its own last tokens, not of the padding behind them."""
    model, ids, mask = llama(), prompt(60, 2), torch.ones(2, 60, dtype=torch.long)
    mask[1, 25:] = 0
    options = {"scorer": scorer, "budget": budget, "max_tokens": 12}
    together, alone = linked(model, **options), linked(model, **options)
    model(ids, attention_mask=mask, **cache_argument(together))
    model(ids[1:, :25], **cache_argument(alone))
    for mine, theirs in zip(together.layers, alone.layers, strict=True):
        kept = [set(head[head >= 0].tolist()) for head in theirs.positions[0]]
        assert [set(head[(head >= 0) & (head < 25)].tolist()) for head in mine.positions[1]] == kept


@pytest.mark.parametrize("kind", ["dense", "fp8"])
@pytest.mark.parametrize("budget", ["adakv", "global", "pyramid"])
@pytest.mark.parametrize("kept", [[1], [0], [1, 1], [2], [2, 1]])
@torch.no_grad()
def test_rows_of_other_lengths_that_stay_are_what_they_were(kind, budget, kept):
    """Those that are left may be too few to fill a gap of what was the longest."""
    model, inputs = llama(), left_padded([200, 25, 12])
    options = {"budget": budget, "merger": "drop", "sink_tokens": 2, "recent_tokens": 6}
    new = MergingDynamicCache if kind == "dense" else partial(MergingQuantizedCache, "fp8")
    cache = new(model=model, **options)
    model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp_min(0), **cache_argument(cache))
    before = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor(kept))
    for mine, theirs in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions[kept])
        there = (mine.positions >= 0).unsqueeze(-1)
        for one, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert one.shape == other[kept].shape
            assert torch.equal(one.where(there, 0), other[kept].where(there, 0))
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    tokens, positions = torch.tensor([[7], [8], [9]]), mask.sum(1, keepdim=True) - 1
    whole = model(tokens, attention_mask=mask, position_ids=positions, **cache_argument(before)).logits
    given = {"attention_mask": mask[kept], "position_ids": positions[kept]}
    step = model(tokens[kept], **given, **cache_argument(cache)).logits
    torch.testing.assert_close(step, whole[kept], rtol=1e-4, atol=1e-4)
    cache.release()
    before.release()


def test_rows_that_go_free_their_slots():
    model = llama()
    cache = linked(model, budget="adakv", scorer="snapkv")
    model(prompt(200, 8), **cache_argument(cache))
    alone, before = copy.deepcopy(cache), cache.report().total.bytes_now
    cache.batch_select_indices(torch.tensor([2]))
    assert cache.report().total.bytes_now < before / 6
    for mine, theirs in zip(cache.layers, alone.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions[2:3])
        there = mine.positions >= 0
        assert torch.equal(mine.keys[there], theirs.keys[2:3][there])
    logits = model(prompt(1), **cache_argument(cache)).logits
    torch.testing.assert_close(logits, model(prompt(1).expand(8, -1), **cache_argument(alone)).logits[2:3])


def test_a_prompt_of_one_token_is_observed():
    model = llama()
    options = {"scorer": "qfilter", "max_tokens": 8, "sink_tokens": 0, "recent_tokens": 2}
    together, alone = MergingDynamicCache(model=model, **options), MergingDynamicCache(model=model, **options)
    inputs = left_padded([30, 1])
    model(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp_min(0), **cache_argument(together))
    model(inputs["input_ids"][1:, -1:], **cache_argument(alone))
    for mine, theirs in zip(together.layers, alone.layers, strict=True):
        for one, other in zip(mine._observed.statistics.queries, theirs._observed.statistics.queries, strict=True):
            torch.testing.assert_close(one[1:], other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("budget", ["uniform", "adakv", "global"])
def test_quantized_chunks_are_folded_as_in_one_piece(budget):
    """With `fold_at="decode"` nothing is quantized before the fold, so chunks attend to full precision."""
    model, ids = llama(), prompt(100)
    caches = [linked(model, True, budget=budget, fold_at="decode", max_tokens=70) for _ in range(2)]
    outputs = [
        greedy(model, ids, 3, **cache_argument(cache), prefill_chunk_size=chunk)
        for cache, chunk in zip(caches, (None, 20), strict=True)
    ]
    torch.testing.assert_close(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits), rtol=1e-4, atol=1e-4)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.positions, other.positions)


# Other implementations ------------------------------------------------------------------------------------------------


def flash_by_definition(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """What flash attention computes: causal from the bottom right, a 2D mask of padding or none, KV heads shared."""
    assert module.config._attn_implementation == "flash_by_definition"  # kernels are loaded by the name in the config
    length, num_queries = key.shape[2], query.shape[2]
    seen = torch.ones(num_queries, length, dtype=torch.bool).tril(length - num_queries)[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, -length:].bool()
        seen = seen | torch.eye(num_queries, length, dtype=torch.bool).roll(length - num_queries, 1)  # padding's own
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, dim=1).mT * scaling
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register("flash_by_definition", flash_by_definition)
    AttentionMaskInterface.register("flash_by_definition", flash_attention_mask)
    return "flash_by_definition"


@pytest.fixture
def flex():
    with torch.compiler.set_stance("force_eager"):  # compiling it takes a minute on a CPU
        yield "flex_attention"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inputs", [prompt(40), left_padded([40, 22])], ids=["plain", "padded"])
@pytest.mark.parametrize("budget", ["uniform", "adakv", "global", "pyramid"])
@pytest.mark.parametrize("implementation", ["flash", "flex"])
def test_other_implementations_give_what_sdpa_gives(implementation, budget, inputs, request):
    model = llama()
    options = {"scorer": "snapkv", "budget": budget, "max_tokens": 16}
    reference = linked(model, **options)
    expected = greedy(model, inputs, **cache_argument(reference))
    reference.release(model)
    implementation = request.getfixturevalue(implementation)
    model.config._attn_implementation = implementation  # set_attn_implementation looks for kernels of this name
    cache = linked(model, **options)
    assert model.config._attn_implementation == f"merging_{implementation}"
    output = greedy(model, inputs, **cache_argument(cache))
    for mine, theirs in zip(cache.layers, reference.layers, strict=True):
        assert torch.equal(mine.positions, theirs.positions)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    # and for another cache what it gave before
    linked_output = greedy(model, inputs, **cache_argument(DynamicCache(config=model.config))).logits
    cache.release(model)
    assert model.config._attn_implementation == implementation
    plain_output = greedy(model, inputs, **cache_argument(DynamicCache(config=model.config))).logits
    assert torch.equal(torch.stack(linked_output), torch.stack(plain_output))
