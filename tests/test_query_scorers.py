"""Scorers that see a model's queries, keys before RoPE, hidden states or weights, against formulas written as loops."""

import copy
import json
import math
import pickle
import sys
import types
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache

import reference
from architectures import causal_lm_types, tiny_config, tiny_model
from merging_cache import SCORERS, LayerStates, MergingConfig, MergingDynamicCache, Scorer
from merging_cache.budgets import PyramidBudget
from merging_cache.layers.guards import CROP_TAKES_LENGTH
from merging_cache.model import cache_argument, can_link, linked_model, rotary_of
from merging_cache.scorers import CapScorer, FastKVzipScorer, KVPressScorer, KVzapScorer, QFilterScorer
from merging_cache.scorers.wrapper import WrappingScorer
from merging_cache.stage import Stage
from merging_cache.states import Statistics
from models import WINDOW, greedy, left_padded, llama, prompt

pytestmark = pytest.mark.core

LENGTH = 45


@dataclass
class Spy(WrappingScorer):
    """Keeps what the other scorer was shown and what it said, by layer."""

    def __post_init__(self):
        super().__post_init__()
        self.said = {}

    def score(self, states):
        scores = super().score(states)
        self.said[states.layer_idx] = states, scores
        return scores


@torch.no_grad()
def said(model, scorer, ids, chunk=None, **options):
    """For each layer the states, the scores, and the true queries before RoPE `[B, Hq, L, D]`."""
    hidden, hooks = {}, []
    for layer in model.model.layers:

        def keep(module, args, kwargs):
            if len(kwargs["hidden_states"]) == len(ids):  # not where the rotary embedding is tried out
                hidden.setdefault(module, []).append(kwargs["hidden_states"])

        hooks.append(layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True))
    spy = Spy(scorer)
    cache = MergingDynamicCache(model=model, scorer=spy, fold_at="decode", **WINDOW | options)
    for piece in ids.split(chunk or ids.shape[1], dim=1):
        model(piece, **cache_argument(cache))
    for hook in hooks:
        hook.remove()
    model(prompt(1, ids.shape[0]), **cache_argument(cache))
    cache.release(model)
    result = []
    for index, layer in enumerate(model.model.layers):
        module = layer.self_attn
        queries = module.q_proj(torch.cat(hidden[module], dim=1)).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        result.append((*spy.said[index], queries.double()))
    return result


def check(scores, formula, *parts, heads_together=None, tolerance=1e-3):
    """Compare `[B, H, L]` scores with the formula for each row and head of `parts`, `[B, H, ...]` each."""
    for row in range(scores.shape[0]):
        heads = [formula(*(part[row, head].double() for part in parts)) for head in range(scores.shape[1])]
        expected = torch.tensor(heads if heads_together is None else heads_together(heads))
        torch.testing.assert_close(scores[row], expected.float(), rtol=tolerance, atol=1e-5)


def grouped(queries):
    """`[B, Hq, L, D]` to `[B, H, G, L, D]`."""
    return queries.unflatten(1, (2, 2))


def unrotated(keys):
    turns = torch.stack([reference.rotation(p, keys.shape[-1]) for p in range(keys.shape[2])])
    return torch.einsum("bhne,ned->bhnd", keys.double(), turns)


def rotated(queries):
    turns = torch.stack([reference.rotation(p, queries.shape[-1]) for p in range(queries.shape[2])])
    return torch.einsum("bhnd,ned->bhne", queries, turns)


chunks = pytest.mark.parametrize("chunk", [None, 16])


@chunks
def test_observed_attention(chunk):
    formula = partial(reference.observed_attention, scale=16**-0.5)
    for states, scores, queries in said(llama(), "observed_attention", prompt(LENGTH, 2), chunk):
        check(scores, formula, states.keys, grouped(rotated(queries)))


@chunks
@pytest.mark.parametrize(
    "options",
    [{}, {"n_future_positions": 3, "n_sink": 0, "epsilon": 0.1}, {"use_covariance": False}, {"use_vnorm": False}],
)
def test_expected_attention(chunk, options):
    full = {"n_future_positions": 20, "n_sink": 4, "use_covariance": True, "use_vnorm": True, "epsilon": 0.0} | options
    formula = partial(reference.expected_attention, **full)
    for states, scores, queries in said(llama(), {"name": "expected_attention", **full}, prompt(LENGTH, 2), chunk):
        check(scores, formula, states.keys, states.values, grouped(queries))


@chunks
def test_qfilter(chunk):
    for states, scores, queries in said(llama(), "qfilter", prompt(LENGTH, 2), chunk):
        check(scores, reference.qfilter, states.keys, grouped(rotated(queries)))


@pytest.mark.parametrize(("chunk", "size"), [(None, 256), (None, 10), (16, 16), (7, 10)])
def test_non_causal(chunk, size):
    formula = partial(reference.non_causal, chunk_size=size)
    spec = {"name": "non_causal", "chunk_size": size}
    for states, scores, queries in said(llama(), spec, prompt(LENGTH, 2), chunk):
        parts = states.keys, states.values, grouped(rotated(queries))
        check(scores, formula, *parts, heads_together=reference.z_scores)


def projection(dimension):
    return torch.randn(16, dimension, generator=torch.Generator().manual_seed(0)).double() / dimension**0.5


@pytest.mark.parametrize("dimension", [48, 5])
def test_leverage(dimension):
    formula = partial(reference.leverage, projection=projection(dimension))
    spec = {"name": "leverage", "sketch_dimension": dimension}
    for states, scores, _ in said(llama(), spec, prompt(LENGTH, 2)):
        # a sketch wider than the keys has directions that the ridge alone carries
        check(scores, formula, unrotated(states.keys), heads_together=reference.z_scores, tolerance=1e-2)


def test_compactor_is_both_between_the_sinks():
    ids, blending = prompt(LENGTH, 2), 0.4
    options = {"blending": blending, "sketch_dimension": 8}
    for states, scores, queries in said(llama(), {"name": "compactor", **options}, ids):
        queries, keys, values = grouped(rotated(queries)), states.keys.double(), states.values.double()
        plain = unrotated(keys)
        for row in range(2):
            lever = reference.z_scores([reference.leverage(plain[row, h, 8:-4], projection(8)) for h in range(2)])
            # chunks are those of the whole sequence, smoothing and z-score those between the sinks
            attention = torch.tensor(
                [unsmoothed_non_causal(keys[row, h], values[row, h], queries[row, h]) for h in range(2)]
            )[:, 8:-4]
            smooth = torch.nn.functional.avg_pool1d(attention, 3, padding=1, stride=1)
            both = blending * torch.tensor(lever) + torch.tensor(reference.z_scores(smooth.tolist()))
            torch.testing.assert_close(scores[row, :, 8:-4], both.float(), rtol=1e-2, atol=1e-2)
        assert scores[:, :, :8].isinf().all()
        assert scores[:, :, -4:].isinf().all()


def unsmoothed_non_causal(keys, values, queries):
    received = [0.0] * len(keys)
    for member in queries:
        for q in member:
            for i, w in enumerate(reference.softmax([float(q @ k) for k in keys])):
                received[i] += w / len(queries)
    return [r * float(v.norm()) for r, v in zip(received, values, strict=True)]


@chunks
def test_cap(chunk):
    options = {"tau": 3.0, "n_future_positions": 20, "n_sink": 2}
    formula = partial(reference.cap, **options)
    for states, scores, queries in said(llama(), {"name": "cap", **options}, prompt(LENGTH, 2), chunk):
        check(scores, formula, states.keys, states.values, grouped(queries), tolerance=5e-3)


def test_pyramidkv_is_snapkv_with_its_budget():
    config = MergingConfig(scorer="pyramidkv")
    assert config.build(linked=True).budget == PyramidBudget()
    ids = prompt(LENGTH, 2)
    for mine, snapkv in zip(said(llama(), "pyramidkv", ids), said(llama(), "snapkv", ids), strict=True):
        assert torch.equal(mine[1], snapkv[1])


@pytest.fixture
def press(monkeypatch):
    """A press with kvpress's interface, where kvpress may not be installed; see test_kvpress.py for its own."""
    kvpress = types.ModuleType("kvpress")

    class ScorerPress:
        pass

    class Press(ScorerPress):
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            self.shown = module, hidden_states, module.rotary_emb, kwargs["position_embeddings"]
            return hidden_states.norm(dim=-1).unsqueeze(1) + keys.norm(dim=-1) * values.norm(dim=-1)

    kvpress.ScorerPress = ScorerPress
    monkeypatch.setitem(sys.modules, "kvpress", kvpress)
    return Press()


@chunks
def test_a_press_is_shown_what_it_asks_for(press, chunk):
    model, ids = llama(), prompt(LENGTH, 2)
    hidden = hidden_states(model, ids)
    for index, (states, scores, _) in enumerate(said(model, KVPressScorer(press), ids, chunk)):
        expected = hidden[index].norm(dim=-1).unsqueeze(1) + states.keys.norm(dim=-1) * states.values.norm(dim=-1)
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
    module, inputs, rotary, (cos, sin) = press.shown
    assert module is model.model.layers[1].self_attn
    assert not hasattr(module, "rotary_emb")  # put there for the press only
    assert rotary is model.model.rotary_emb
    last = torch.arange(LENGTH)[None, -inputs.shape[1] :].expand(2, -1)
    torch.testing.assert_close((cos, sin), rotary(inputs, last))
    with pytest.raises(TypeError, match="press is 'snapkv'; give a ScorerPress of kvpress"):
        KVPressScorer("snapkv")


def test_a_press_without_kvpress(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ImportError, match="KVPressScorer needs kvpress: pip install kvpress"):
        KVPressScorer("snapkv")


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_critical_kv(ratio):
    model = llama()
    spec = {"name": "critical_kv", "scorer": "keydiff", "first_stage_ratio": ratio, "epsilon": 0.01}
    for index, (states, scores, _) in enumerate(said(model, spec, prompt(LENGTH, 2))):
        weight = model.model.layers[index].self_attn.o_proj.weight.T.detach().double()  # [Hq * D, hidden]
        inner = SCORERS["keydiff"]().score(states)
        raised = inner - inner.amin(dim=-1, keepdim=True).clamp_max(0)  # these can be negative
        assert states.num_slots == (LENGTH + 0) // 2
        first = max(1, int(states.num_slots * ratio)) if ratio else 0
        for row in range(2):
            for head in range(2):
                fixed = reference.top_tokens(inner[row, head].tolist(), first)
                for i in range(LENGTH):
                    if i in fixed:
                        assert scores[row, head, i] == math.inf
                        continue
                    value = states.values[row, head, i].double()
                    parts = [weight[(2 * head + g) * 16 : (2 * head + g + 1) * 16] for g in range(2)]
                    norm = sum(float((value @ part).abs().sum()) for part in parts) / 2
                    expected = (raised[row, head, i].item() + 0.01) * norm
                    assert scores[row, head, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_chunk_kv_scores_whole_chunks_of_each_row():
    for states, scores, _ in said(
        llama(), {"name": "chunk_kv", "scorer": "knorm", "chunk_length": 7}, prompt(LENGTH, 2)
    ):
        inner = SCORERS["knorm"]().score(states)
        for row in range(2):
            for i in range(LENGTH):
                chunk = inner[row, :, i // 7 * 7 : i // 7 * 7 + 7]
                expected = chunk.sum(0).mean()
                torch.testing.assert_close(scores[row, :, i], expected.expand(2))
        assert not torch.equal(scores[0], scores[1])


# Learned weights ------------------------------------------------------------------------------------------------------


def kvzap_weights(folder, kind, hidden=64, heads=2, layers=2):
    """Random weights as they are published."""
    torch.manual_seed(7)
    shapes = {"weight": (heads, hidden), "bias": (heads,)}
    if kind == "mlp":
        shapes = {"0.weight": (24, hidden), "0.bias": (24,), "2.weight": (heads, 24), "2.bias": (heads,)}
    tensors = {f"layers.{i}.{name}": torch.randn(shape) for i in range(layers) for name, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "kvzap", "input_dim": hidden, "output_dim": heads, "n_modules": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


def gate_weights(folder, hidden=64, heads=2, group=2, layers=2, dim=16, sinks=16):
    torch.manual_seed(8)
    shapes = {
        "q_proj.weight": (heads * group * dim, hidden),
        "q_proj.bias": (heads * group * dim,),
        "k_proj.weight": (heads * dim, hidden),
        "q_norm.weight": (dim,),
        "k_norm.weight": (dim,),
        "k_base": (heads, 1, sinks, dim),
        "b": (heads, 1, group),
    }
    tensors = {f"{i}.{name}": torch.randn(shape) for i in range(layers) for name, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "gates.safetensors")
    return tensors


@torch.no_grad()
def hidden_states(model, ids):
    """The input of each layer's attention."""
    seen = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return seen


@chunks
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_kvzap(kind, chunk, tmp_path):
    tensors, model, ids = kvzap_weights(tmp_path / "w", kind), llama(), prompt(LENGTH, 2)
    scorer = KVzapScorer.from_pretrained(tmp_path / "w")
    hidden = hidden_states(model, ids)
    for index, (_, scores, _) in enumerate(said(model, scorer, ids, chunk)):
        w = {name.split(".", 2)[2]: t for name, t in tensors.items() if name.startswith(f"layers.{index}.")}
        if kind == "linear":
            module = torch.nn.Linear(64, 2)
        else:
            module = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.GELU(), torch.nn.Linear(24, 2))
        module.load_state_dict(w)
        torch.testing.assert_close(scores, module(hidden[index]).mT.detach(), rtol=1e-3, atol=1e-3)


def test_fast_kvzip(tmp_path):
    tensors, model, ids = gate_weights(tmp_path / "w"), llama(), prompt(LENGTH, 2)
    hidden = hidden_states(model, ids)
    scorer = {"name": "fast_kvzip", "weights": str(tmp_path / "w"), "n_sink": 3, "window_ratio": 0.1}

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    for index, (_, scores, _) in enumerate(said(model, scorer, ids)):
        w = {name.split(".", 1)[1]: t.double() for name, t in tensors.items() if name.startswith(f"{index}.")}
        for row in range(2):
            for head in range(2):
                for i in range(LENGTH):
                    if i < 3 or i >= LENGTH - 4:
                        assert scores[row, head, i] == 1
                        continue
                    h, total = hidden[index][row, i].double(), 0.0
                    q = (w["q_proj.weight"] @ h + w["q_proj.bias"]).view(2, 2, 16)[head]
                    k = rms((w["k_proj.weight"] @ h).view(2, 16)[head], w["k_norm.weight"])
                    for member in range(2):
                        one = rms(q[member], w["q_norm.weight"])
                        own = float(one @ k) / 4 + float(w["b"][head, 0, member])
                        total += 1 / (1 + sum(math.exp(float(one @ s) / 4 - own) for s in w["k_base"][head, 0]))
                    assert scores[row, head, i].item() == pytest.approx(total / 2, rel=1e-3, abs=1e-4)


def test_gates_in_one_file_of_modules(tmp_path):
    """As Fast KVzip publishes them: a pickle of modules, with numpy arrays about their training."""
    tensors = gate_weights(tmp_path / "safe")
    modules = [{n.split(".", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{i}.")} for i in range(2)]
    folder = tmp_path / "pt"
    folder.mkdir()
    losses = [np.linspace(1, 0, 5), np.linspace(1, 0, 5, dtype=np.float32)]
    torch.save({"module": modules, "losses": losses}, folder / "gates.pt")
    for path in (folder, folder / "gates.pt"):
        one, other = (FastKVzipScorer.from_pretrained(kind)._weights.tensors for kind in (tmp_path / "safe", path))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    torch.save(modules, folder / "others.pt")
    with pytest.raises(ValueError, match="others.pt does not hold a list of modules' tensors under 'module'"):
        FastKVzipScorer.from_pretrained(folder / "others.pt")
    with pytest.raises(ValueError, match=r"holds \['gates.pt', 'others.pt'\]; name one of these files"):
        FastKVzipScorer.from_pretrained(folder)


def test_weights_from_the_hub(tmp_path, monkeypatch):
    """What is asked of the hub for each way to name weights there."""
    from merging_cache.scorers import weights

    gate_weights(tmp_path / "inside")
    asked = []

    def download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(weights, "snapshot_download", download)
    for name in ("owner/gates/inside", "owner/gates/inside/gates.safetensors"):
        assert FastKVzipScorer.from_pretrained(name)._weights.tensors
    folder = ["inside/*.safetensors", "inside/*.pt"]
    assert asked == [("owner/gates", folder), ("owner/gates", ["inside/gates.safetensors"])]
    (tmp_path / "inside" / "gates.safetensors").rename(tmp_path / "gates.safetensors")
    assert FastKVzipScorer.from_pretrained("owner/gates")._weights.tensors
    assert asked[-1] == ("owner/gates", ["*.safetensors", "*.pt"])


def test_qfilter_from_weights_needs_no_model(tmp_path):
    filters = torch.randn(2, 2, 16)
    save_file({"q_filters": filters}, tmp_path / "model.safetensors")
    model = llama()
    spy = Spy(QFilterScorer(weights=str(tmp_path)))
    cache = MergingDynamicCache(config=model.config, scorer=spy, **WINDOW)
    model(prompt(LENGTH), **cache_argument(cache))
    for index in range(2):
        states, scores = spy.said[index]
        torch.testing.assert_close(scores, -(states.keys * filters[index][None, :, None]).sum(-1))
    save_file({"q_filters": torch.randn(2, 3, 16)}, tmp_path / "model.safetensors")
    cache = MergingDynamicCache(config=model.config, scorer=QFilterScorer(weights=str(tmp_path)), **WINDOW)
    with pytest.raises(ValueError, match="which do not fit layer 0"):
        model(prompt(LENGTH), **cache_argument(cache))


def test_weights_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="weights is ''; give the folder"):
        MergingConfig(scorer="kvzap")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no weights"):
        KVzapScorer.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="there is no folder nowhere, and a name on the hub is owner/name"):
        KVzapScorer.from_pretrained("nowhere")
    with pytest.raises(ValueError, match="there is no folder owner/name, and the hub did not give it"):
        KVzapScorer.from_pretrained("owner/name")
    wrong_ones = (({"heads": 3}, "scores 3 KV heads, but layer 0 has 2"), ({"layers": 1}, "no weights for layer 1"))
    for wrong, message in wrong_ones:
        kvzap_weights(tmp_path / "w", "linear", **wrong)
        model = llama()
        cache = MergingDynamicCache(model=model, scorer=KVzapScorer(str(tmp_path / "w")))
        with pytest.raises(ValueError, match=message):
            model(prompt(LENGTH), **cache_argument(cache))


def test_layers_load_their_weights_once(tmp_path, monkeypatch):
    """Named by a dict, a scorer is built once and serves all layers."""
    from merging_cache.scorers import weights

    kvzap_weights(tmp_path / "w", "linear")
    loaded, load_file = [], weights.load_file
    monkeypatch.setattr(weights, "load_file", lambda file: loaded.append(file) or load_file(file))
    model = llama()
    cache = MergingDynamicCache(model=model, scorer={"name": "kvzap", "weights": str(tmp_path / "w")}, **WINDOW)
    model(prompt(LENGTH), **cache_argument(cache))
    assert all(layer.num_slots for layer in cache.layers)
    assert loaded == [tmp_path / "w" / "model.safetensors"]


def test_files_that_are_no_weights(tmp_path):
    for name in ("junk.safetensors", "junk.pt"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(ValueError, match=f"{name} could not be read as weights"):
            KVzapScorer.from_pretrained(tmp_path / name)
    tensors = kvzap_weights(tmp_path / "w", "linear")
    save_file({name: t for name, t in tensors.items() if "bias" not in name}, tmp_path / "w" / "model.safetensors")
    for wrong in (tmp_path / "w", tmp_path / "wide"):
        kvzap_weights(tmp_path / "wide", "mlp", hidden=32)
        model = llama()
        cache = MergingDynamicCache(model=model, scorer=KVzapScorer(wrong))
        with pytest.raises(ValueError, match=r"the weights of layer 0 in .* do not fit hidden states of width 64"):
            model(prompt(LENGTH), **cache_argument(cache))


def test_hidden_states_need_the_model_and_leave_no_hooks(tmp_path):
    from merging_cache import merging_attention

    kvzap_weights(tmp_path / "w", "linear")
    model = llama()
    attention = model.model.layers[0].self_attn
    cache = MergingDynamicCache(model=model, scorer={"name": "kvzap", "weights": str(tmp_path / "w")}, **WINDOW)
    assert len(attention._forward_pre_hooks) == 1
    model(prompt(LENGTH), **cache_argument(cache))
    cache.release(model)
    assert not attention._forward_pre_hooks
    other = MergingDynamicCache(model=model, scorer="snapkv", **WINDOW)
    assert not attention._forward_pre_hooks
    other.release(model)
    unlinked = MergingDynamicCache(config=model.config, scorer=KVzapScorer(str(tmp_path / "w")), **WINDOW)
    with merging_attention(model), pytest.raises(ValueError, match="KVzapScorer must see the hidden states of Llama"):
        model(prompt(LENGTH), **cache_argument(unlinked))


# Rotary embeddings ----------------------------------------------------------------------------------------------------

ROTARY = ["llama", "qwen2", "qwen3", "phi3", "phi", "gpt_neox", "cohere", "glm", "stablelm", "gemma3_text", "gpt_oss"]


@torch.no_grad()
@pytest.mark.parametrize("family", ROTARY)
def test_rotary_of_every_layout(family):
    """One token at all positions has, before RoPE, the same query everywhere in the first layer."""
    try:
        model = tiny_model(family)
    except ValueError:
        model = tiny_model(family, attention="eager")
    spy = Spy("expected_attention")
    cache = MergingDynamicCache(model=model, scorer=spy, **WINDOW)
    model(torch.full((1, LENGTH), 7), **cache_argument(cache))
    index, (states, _) = min(spy.said.items())
    count, mean, scatter = states.statistics.queries
    assert (count == LENGTH - 4).all()
    if index == 0:  # later layers' inputs differ a little
        spread = scatter.diagonal(dim1=-2, dim2=-1).sum(-1) / count.squeeze(-1)
        assert (spread <= 1e-6 * mean.square().sum(-1)).all()
    # rotating back what is rotated, and the average as the average
    rotary, vectors = rotary_of(states.module, mean), torch.randn(1, 3, 20, mean.shape[-1])
    positions = torch.arange(5, 25)[None]
    torch.testing.assert_close(rotary.unrotated(rotary.rotated(vectors, positions), positions), vectors)
    same = vectors[:, :, :1]
    average = rotary.rotated(same.expand(-1, -1, 20, -1), positions).mean(dim=2, keepdim=True)
    torch.testing.assert_close(rotary.mean_rotated(same, 5, 20), average)


# refused: positions that are learned, or none; complex rotations (Llama 4); queries mixed along the sequence (Zaya)
NOT_ROTARY = """bart beam bert bert-generation biogpt blenderbot blenderbot-small camembert ctrl data2vec-text electra
    ernie gpt-sw3 gpt2 gpt_bigcode jamba marian mbart opt pegasus plbart roberta roberta-prelayernorm whisper
    xlm-roberta xlm-roberta-xl zamba2"""
OTHER_ROTARY = "llama4 llama4_text zaya"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rotary_is_right_or_refused():
    """Over all architectures: a first layer that is not refused gives one query for one token."""
    right, refused = [], []
    for family in causal_lm_types():
        try:
            model = tiny_model(family)
            spy = Spy("expected_attention")
            cache = MergingDynamicCache(model=model, scorer=spy, merger="similarity", **WINDOW)
        except Exception:
            continue
        ids = torch.full((1, LENGTH), 7)
        try:
            with torch.no_grad():
                model(ids, **cache_argument(DynamicCache(config=model.config)))
        except Exception:
            continue
        try:
            with torch.no_grad():
                model(ids, **cache_argument(cache))
        except ValueError as error:
            if "uses cache of its own" in str(error):
                continue
            assert "rotary position embedding of" in str(error) or "cannot be compared" in str(error), (family, error)
            refused.append(family)
            continue
        if 0 in spy.said:
            count, mean, scatter = spy.said[0][0].statistics.queries
            spread = scatter.diagonal(dim1=-2, dim2=-1).sum(-1) / count.squeeze(-1)
            assert (spread <= 1e-4 * mean.square().sum(-1) + 1e-12).all(), family
        if spy.said:
            right.append(family)
    print(f"rotary undone: {len(right)}: {' '.join(right)}\nrefused: {' '.join(refused)}")
    assert set(refused) <= {*NOT_ROTARY.split(), *OTHER_ROTARY.split()}
    assert len(right) >= 45  # of the oldest transformers; twice as many of the newest


@torch.no_grad()
@pytest.mark.parametrize("family", ["codegen", "gptj"])
@pytest.mark.parametrize("rotary_dim", [8, 16])
def test_rotary_tables_end_where_the_model_does(family, rotary_dim):
    """Sines before cosines, tokens before heads, of the first channels or of all: against the model's own functions."""
    config = tiny_config(family)
    config.rotary_dim, config.n_positions, config.n_embd = rotary_dim, 64, 64
    model = AutoModelForCausalLM.from_config(config).eval()
    if not can_link(model):
        pytest.skip("before transformers 5.24 its attention does not go through the interface")
    cache = MergingDynamicCache(model=model, scorer={"name": "expected_attention", "n_future_positions": 512}, **WINDOW)
    model(prompt(60), **cache_argument(cache))  # positions beyond the last are averaged over, too
    rotary = cache.layers[0]._observed.owner.rotary
    states, positions = torch.randn(1, 4, 5, 16), torch.tensor([[0, 3, 9, 62, 63]])
    file = sys.modules[type(model).__module__]
    sin, cos = model.transformer.rotary_emb(states, positions)
    turned = file.apply_rotary_pos_emb(states.transpose(1, 2)[..., :rotary_dim], sin, cos)
    expected = torch.cat([turned, states.transpose(1, 2)[..., rotary_dim:]], dim=-1).transpose(1, 2)
    torch.testing.assert_close(rotary.rotated(states, positions), expected)
    torch.testing.assert_close(rotary.unrotated(expected, positions), states, rtol=1e-4, atol=1e-5)


def test_changing_frequencies_are_refused():
    model = llama()
    model.model.rotary_emb.rope_type = "dynamic"
    cache = MergingDynamicCache(model=model, scorer="expected_attention")
    with pytest.raises(ValueError, match="rotary position embedding of LlamaAttention could not be made out"):
        model(prompt(LENGTH), **cache_argument(cache))


def test_absolute_positions_are_refused():
    model = tiny_model("gpt2")
    cache = MergingDynamicCache(model=model, scorer="leverage")
    with pytest.raises(ValueError, match="rotary position embedding of GPT2Attention could not be made out"):
        model(prompt(LENGTH), **cache_argument(cache))


def test_the_probe_leaves_no_trace():
    model, ids = llama(), prompt(LENGTH)
    plain = MergingDynamicCache(config=model.config, compression_ratio=0)
    expected = model(ids, **cache_argument(plain)).logits
    cache = MergingDynamicCache(model=model, scorer="expected_attention", **WINDOW)
    assert torch.equal(model(ids, **cache_argument(cache)).logits, expected)
    assert linked_model(model.model.layers[0].self_attn) is model
    twin = copy.deepcopy(cache)
    assert twin.layers[0]._observed.owner is cache.layers[0]._observed.owner
    cache.release(model)


# Statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scorer", ["observed_attention", "expected_attention", "qfilter", {"name": "non_causal", "chunk_size": 16}]
)
@pytest.mark.parametrize("fold_at", ["prefill", "decode"])
def test_statistics_are_bounded_and_follow_the_slots(scorer, fold_at):
    model, ids = llama(), prompt(90, 2)
    cache = MergingDynamicCache(model=model, scorer=scorer, max_tokens=20, fold_at=fold_at, **WINDOW)
    for piece in ids.split(30, dim=1):
        model(piece, **cache_argument(cache))
        for layer in cache.layers:
            assert layer._observed.queries.shape[2] <= 15  # never all of them
    model(prompt(1, 2), **cache_argument(cache))
    for layer in cache.layers:
        statistics = layer._remembered["scorer"]
        if statistics.tokens is not None:
            assert statistics.tokens.shape[2] == 20 + 1
        assert all(tensor.shape[:2] == (2, 4) for tensor in statistics.queries)
    before = [layer._remembered["scorer"] for layer in cache.layers]
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    for layer, statistics in zip(cache.layers, before, strict=True):
        after = layer._remembered["scorer"]
        pairs = [*zip(after.queries, statistics.queries, strict=True), (after.tokens, statistics.tokens)]
        assert all(torch.equal(mine, theirs[[1, 1, 0]]) for mine, theirs in pairs if mine is not None)


@torch.no_grad()
def test_cap_goes_by_the_queries_since_the_last_fold(monkeypatch):
    """So nothing is held after a fold, unless for rows that did not fold."""
    counts, score = [], CapScorer.score
    monkeypatch.setattr(
        CapScorer, "score", lambda *args: counts.append(args[1].statistics.queries[0].flatten()) or score(*args)
    )
    model = llama()
    cache = MergingDynamicCache(model=model, scorer="cap", budget="uniform", merger="drop", max_tokens=20, **WINDOW)
    for number, length in enumerate((40, 25, 30)):
        model(prompt(length, seed=number), **cache_argument(cache))
        assert all(layer._observed.statistics is None for layer in cache.layers)
    assert [count[0].item() for count in counts] == [36, 36, 25, 25, 30, 30]  # by layer; sinks do not count
    cache.reset()
    inputs = left_padded([40, 15])
    position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    model(**inputs, position_ids=position_ids, **cache_argument(cache))
    for layer in cache.layers:
        assert layer._observed.statistics.queries[0].tolist() == [[[0.0]] * 4, [[11.0]] * 4]


@torch.no_grad()
def test_cap_does_without_rotary_embeddings():
    """Models that have none, or one that cannot be made out, are as if nothing were ever rotated."""
    states = LayerStates(torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8), queries=torch.randn(1, 4, 40, 8))
    states = replace(states, query_positions=torch.arange(40)[None])
    unmoved = types.SimpleNamespace(unrotated=lambda queries, _: queries, mean_rotated=lambda mean, *_: mean)
    scores = []
    for rotary in (None, unmoved):
        states = replace(states, rotary=rotary)
        scores.append(CapScorer().score(replace(states, statistics=CapScorer().observe(states, 40))))
    assert torch.equal(*scores)
    model = tiny_model("gpt2")
    cache = MergingDynamicCache(model=model, scorer="cap", budget="uniform", max_tokens=20, **WINDOW)
    model(prompt(50), **cache_argument(cache))
    assert cache.layers[0].num_slots == 20


def test_survivors_keep_their_statistics():
    """After a fold each slot has what was observed for its own token."""
    model, ids = llama(), prompt(50)
    whole = MergingDynamicCache(model=model, scorer="observed_attention", fold_at="decode", **WINDOW)
    model(ids, **cache_argument(whole))
    folded = MergingDynamicCache(model=model, scorer="observed_attention", **WINDOW)
    model(ids, **cache_argument(folded))
    before, after = (cache.layers[0]._remembered["scorer"].tokens for cache in (whole, folded))
    index = folded.layers[0].positions.unsqueeze(-1).expand(-1, -1, -1, 2)
    torch.testing.assert_close(after, before.gather(2, index), rtol=2**-8, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("budget", ["uniform", "global"])
@pytest.mark.parametrize("scorer", ["kvzip", "leave_one_out", "non_causal"])
def test_statistics_of_slots_take_two_bytes_each(scorer, budget):
    """However different the heads are; they follow the rows, and go when their rows do."""
    model = llama()
    cache = MergingDynamicCache(model=model, scorer=scorer, budget=budget, merger="drop", **WINDOW)
    model(prompt(50, 3), **cache_argument(cache))

    def assert_small(layer):
        ragged = layer.storage.layout.nbytes if budget == "global" else 0
        slots = int(layer.slots_per_head.sum())
        assert layer.storage.nbytes == slots * (2 * 16 * 4 + 4 + 2) + ragged

    before = [layer._remembered["scorer"].tokens for layer in cache.layers]
    for layer, kept in zip(cache.layers, before, strict=True):
        assert kept.shape == layer.positions.shape
        assert kept.any()
        assert_small(layer)
    for rows in ([1, 1, 0, 2], [2]):
        cache.reorder_cache(torch.tensor(rows))
        before = [kept[rows] for kept in before]
        for layer, kept in zip(cache.layers, before, strict=True):
            assert torch.equal(layer._remembered["scorer"].tokens, kept)
        before = [kept[..., -layer.num_slots :] for layer, kept in zip(cache.layers, before, strict=True)]
    for layer in cache.layers:
        assert_small(layer)


def test_padding_leaves_no_statistics():
    model, inputs = llama(), left_padded([40, 23])
    together = MergingDynamicCache(model=model, scorer="expected_attention", max_tokens=20, **WINDOW)
    greedy(model, inputs, new_tokens=2, **cache_argument(together))
    alone = MergingDynamicCache(model=model, scorer="expected_attention", max_tokens=20, **WINDOW)
    greedy(model, inputs["input_ids"][1:, -23:], new_tokens=2, **cache_argument(alone))
    for mine, theirs in zip(together.layers, alone.layers, strict=True):
        for one, other in zip(mine._observed.statistics.queries, theirs._observed.statistics.queries, strict=True):
            torch.testing.assert_close(one[1:], other, rtol=1e-3, atol=1e-3)


OBSERVING = ["snapkv", "tova", "expected_attention", "observed_attention", "qfilter", "cap", "compactor"]


@pytest.mark.parametrize("scorer", OBSERVING)
def test_observed_tokens_cannot_be_cropped(scorer):
    """What was remembered of their queries would stay."""
    model = llama()
    cache = MergingDynamicCache(model=model, scorer=scorer, fold_at="decode", **WINDOW)
    model(prompt(60), **cache_argument(cache))
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"cannot crop 20 tokens from layer 0: \w+Scorer and RefitMerger observed"):
        cache.crop(-20)
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("scorer", OBSERVING)
def test_chunks_while_the_past_is_recorded(scorer):
    """Nothing is digested until the crop; then it is as if the prompt had come in one piece."""
    model, ids, kept = llama(), prompt(60), []
    for chunk in (60, 16):
        cache = MergingDynamicCache(model=model, scorer=scorer, **WINDOW)
        cache.activate_past_recording()
        for piece in ids.split(chunk, dim=1):
            model(piece, **cache_argument(cache))
        cache.crop(55 if CROP_TAKES_LENGTH else -5)
        kept.append([layer.positions for layer in cache.layers])
        assert cache.get_seq_length() == 55
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one, other)


def test_snapkv_when_old_queries_see_nothing_that_is_stored():
    model = llama()
    cache = MergingDynamicCache(model=model, scorer="snapkv", sink_tokens=0, recent_tokens=8, max_tokens=8)
    for piece in prompt(64).split(16, dim=1):
        model(piece, **cache_argument(cache))
    assert all(layer.num_slots == 8 for layer in cache.layers)


def test_snapkv_keeps_its_window_of_a_stream():
    """A window longer than what is stored is still set apart from the tokens before it, once more than it was seen."""
    model, options = llama(), {"sink_tokens": 0, "recent_tokens": 0, "max_tokens": 16}
    cache = MergingDynamicCache(model=model, scorer={"name": "snapkv", "window_size": 24}, **options)
    for piece in prompt(80).split(8, dim=1):
        model(piece, **cache_argument(cache))
    for layer in cache.layers:
        assert layer.positions.tolist() == [[list(range(64, 80))] * 2]


def test_generated_tokens_count_as_the_mean():
    """A scorer that scores prompt tokens only must not evict the model's own answer first."""
    model, spy = llama(), Spy({"name": "non_causal", "chunk_size": 16})
    cache = MergingDynamicCache(model=model, scorer=spy, fold_at="decode", compression_ratio=0.1, **WINDOW)
    model(prompt(32), **cache_argument(cache))
    for token in prompt(32, seed=2)[0]:
        model(token.view(1, 1), **cache_argument(cache))
    model(prompt(16, seed=3), **cache_argument(cache))
    model(prompt(1), **cache_argument(cache))
    states, scores = spy.said[0]
    received = states.statistics.tokens
    generated = (states.positions >= 32) & (states.positions < 64)
    assert (received[generated] == 0).all()
    assert (received[~generated] > 0).all()
    mean = (received.sum(-1) / (~generated).sum(-1)).unsqueeze(-1)
    filled = received.masked_fill(generated, 0) + mean * generated
    filled = filled * states.values.norm(dim=-1)
    smooth = torch.nn.functional.avg_pool1d(filled, 3, padding=1, stride=1)
    expected = (smooth - smooth.mean()) / smooth.std()
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "glm"])
def test_rotary_in_half_precision_with_a_large_channel(dtype, family):
    model, plain = tiny_model(family).to(dtype), tiny_model(family)
    attention = next(module for module in model.modules() if hasattr(module, "q_proj"))
    attention.q_proj.weight[7] *= 300  # a channel that turns slowly
    vectors, positions, rotated = torch.randn(1, 2, 5, 16), torch.arange(5)[None], []
    for one in (model, plain):
        cache = MergingDynamicCache(model=one, scorer="leverage", **WINDOW)
        one(prompt(40), **cache_argument(cache))
        rotated.append(cache.layers[0]._observed.owner.rotary.rotated(vectors, positions))
        cache.release()
    torch.testing.assert_close(*rotated, rtol=1e-2, atol=2e-2)
    assert not torch.allclose(rotated[0], vectors, atol=0.1)


def test_images_have_positions_of_which_a_cache_is_not_told():
    model = llama()
    model.config.rope_parameters["mrope_section"] = [2, 3, 3]
    model.config.vision_config = object()
    cache = MergingDynamicCache(model=model, scorer="expected_attention")
    with pytest.raises(ValueError, match="tokens of an image have several positions"):
        model(prompt(LENGTH), **cache_argument(cache))


def test_offloaded_weights_are_named():
    module = copy.deepcopy(llama().model.layers[0].self_attn).to("meta")
    states = LayerStates(torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16), queries=torch.randn(1, 4, 9, 16))
    states = replace(states, query_positions=torch.arange(9)[None], module=module)
    with pytest.raises(ValueError, match="LlamaAttention has no output projection .* or one that cannot be tried out"):
        SCORERS["critical_kv"]().score(states)


@torch.no_grad()
def test_autocast_does_not_reach_the_scores():
    states, kept = (torch.randn(1, 2, 60, 16), torch.randn(1, 2, 60, 16)), []
    for enabled in (False, True):
        cache = MergingDynamicCache(config=llama().config, scorer="keydiff", **WINDOW)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            cache.update(*states, 0)
        kept.append(cache.layers[0])
    assert torch.equal(kept[0].positions, kept[1].positions)
    assert torch.equal(kept[0].values, kept[1].values)


def test_cap_without_temperature():
    for _, scores, _ in said(llama(), {"name": "cap", "tau": 0}, prompt(LENGTH)):
        assert not scores.isnan().any()


def test_pickles_do_not_carry_weights(tmp_path):
    kvzap_weights(tmp_path / "w", "linear")
    scorer = KVzapScorer.from_pretrained(tmp_path / "w")
    for other in (pickle.loads(pickle.dumps(scorer)), copy.deepcopy(scorer)):
        assert other == scorer
        assert other._weights.tensors.keys() == scorer._weights.tensors.keys()
    assert len(pickle.dumps(scorer)) < 500


def test_fast_kvzip_window_of_long_sequences(tmp_path):
    gate_weights(tmp_path / "w")
    scorer = FastKVzipScorer(str(tmp_path / "w"), window_size=50)
    for length, window in ((31_999, 639), (32_000, 50)):
        statistics = Statistics(torch.zeros(1, 1, length))
        states = LayerStates(torch.zeros(1, 1, length, 1), torch.zeros(1, 1, length, 1), statistics=statistics)
        assert int((scorer.score(states) == 1).sum()) == window + 4


def test_compactor_blends_by_the_share_that_is_lost():
    states, _, _ = said(llama(), "compactor", prompt(LENGTH))[0]
    for slots in (9, 27):
        shown = replace(states, num_slots=slots)
        one = SCORERS["compactor"]().score(shown)
        assert torch.equal(one, SCORERS["compactor"](blending=1 - slots / LENGTH).score(shown))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "expected_attention", "n_future_positions": 0}, "n_future_positions is 0"),
        ({"name": "critical_kv", "first_stage_ratio": 2}, "first_stage_ratio is 2; it must be at most 1"),
        ({"name": "chunk_kv", "chunk_length": 0}, "chunk_length is 0"),
        ({"name": "chunk_kv", "scorer": "snap"}, "unknown scorer 'snap'"),
        ({"name": "leverage", "sketch_dimension": 0}, "sketch_dimension is 0"),
        ({"name": "non_causal", "chunk_size": 0}, "chunk_size is 0"),
        ({"name": "cap", "tau": -1}, "tau is -1"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(ValueError, match=message):
        MergingConfig(scorer=spec)


def test_functions_are_wrapped_too():
    scorer = SCORERS["chunk_kv"](scorer=lambda states: states.values.norm(dim=-1), chunk_length=3)
    states = LayerStates(torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16))
    expected = SCORERS["chunk_kv"](scorer="value_norm", chunk_length=3).score(states)
    assert torch.equal(scorer.score(states), expected)
    with pytest.raises(TypeError, match="scorer is 3; .* or a function of a layer's states"):
        SCORERS["chunk_kv"](scorer=3)


def test_wrapped_scorers_go_through_json(tmp_path):
    config = MergingConfig(scorer={"name": "critical_kv", "scorer": {"name": "chunk_kv", "scorer": "snapkv"}})
    config.to_json_file(tmp_path / "merging.json")
    assert MergingConfig.from_json_file(tmp_path / "merging.json") == config
    built = MergingConfig(scorer=config.build().scorer)
    assert MergingConfig.from_dict(built.to_dict()).build().scorer == config.build().scorer
    assert built.build().scorer.needs_queries


class Everything(Scorer):
    """Asks for all there is."""

    def score(self, states):
        return states.keys.norm(dim=-1)


def test_a_scorer_made_of_another_asks_for_all_that_it_asks_for():
    """Whatever a stage may ask for: what is added to `Stage` or `Scorer` has to be handed on, too."""
    own = [name for of in (Stage, Scorer) for name in vars(of).get("__annotations__", ())]
    assert {"needs_queries", "needs_outputs", "uses_rotary", "recent_share"} <= set(own)
    for name in own:
        setattr(Everything, name, 7)
    for kind in (WrappingScorer, SCORERS["chunk_kv"]):
        outer = kind(Everything())
        assert {name: getattr(outer, name) for name in own} == dict.fromkeys(own, 7)
