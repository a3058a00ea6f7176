"""Scorers that have the model read the prompt again: against attention weights of an ordinary second pass."""

from dataclasses import replace

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache

from merging_cache import LayerStates, MergingDynamicCache, MergingQuantizedCache, Reading
from merging_cache.budgets import AdaKVBudget, UniformBudget
from merging_cache.fold import Fold
from merging_cache.layers import MergingHybridLayer, again
from merging_cache.mergers import DropMerger
from merging_cache.model import cache_argument
from merging_cache.scorers import KVzipScorer, LeaveOneOutScorer
from merging_cache.states import Statistics
from models import WINDOW, assert_same_cache, greedy, left_padded, llama, prompt, tiny_model

pytestmark = pytest.mark.core
LINEAR = ["qwen3_next", "falcon_h1"] if MergingHybridLayer else []  # older transformers keep their states elsewhere
KINDS = {"dynamic": MergingDynamicCache, "fp8": lambda **options: MergingQuantizedCache("fp8", **options)}

BART = {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
BART |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


BOTH = pytest.mark.parametrize("name", ["kvzip", "leave_one_out"])


def rereading(model, name="kvzip", kind="dynamic", chunk_size=2048, **options):
    scorer = {"name": name, "chunk_size": chunk_size}
    return KINDS[kind](model=model, **{"scorer": scorer, "merger": "drop"} | WINDOW | options)


@torch.no_grad()
def by_attention(model, ids, chunk_size, plus):
    """By layer `[H, L]`: the largest weight on each token of an eager model that reads the ids again, in chunks."""
    length, best = ids.shape[1], None
    for piece in ids.split(chunk_size, dim=1):
        cache, inputs = DynamicCache(config=model.config), []
        model(ids, **cache_argument(cache))
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs, inputs=inputs: inputs.append(kwargs["hidden_states"]), with_kwargs=True
            )
            for layer in model.model.layers
        ]
        found = model(piece, **cache_argument(cache), output_attentions=True).attentions
        for hook in hooks:
            hook.remove()
        weights = [one[0, :, :, :length] for one in found]  # [Hq, q, L]
        if plus:
            weights = [one / given[0].norm(dim=-1)[:, None] for one, given in zip(weights, inputs, strict=True)]
        weights = [one.amax(dim=1) for one in weights]
        best = weights if best is None else [torch.maximum(*pair) for pair in zip(best, weights, strict=True)]
    if plus:
        for number, layer in enumerate(model.model.layers):
            parts = layer.self_attn.o_proj.weight.unflatten(1, (len(best[number]), -1))  # [hidden, Hq, D]
            values = cache.layers[number].values[0, :, :length].repeat_interleave(2, dim=0)  # [Hq, L, D]
            best[number] = best[number] * torch.einsum("nhd,hld->hln", parts, values).norm(dim=-1)
    heads = cache.layers[0].keys.shape[1]
    return [one.unflatten(0, (heads, -1)).amax(dim=1) for one in best]


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("chunk_size", [2048, 25])
@torch.no_grad()
def test_scores_are_the_largest_attention_of_a_second_pass(chunk_size, plus, monkeypatch):
    model, ids, shown = llama("eager"), prompt(60), []
    expected = by_attention(model, ids, chunk_size, plus)
    before = model(ids, **cache_argument(DynamicCache(config=model.config))).logits
    score = KVzipScorer.score
    monkeypatch.setattr(KVzipScorer, "score", lambda *args: shown.append(score(*args)) or shown[-1])
    scorer = {"name": "kvzip", "chunk_size": chunk_size, "plus": plus}
    cache = rereading(model, scorer=scorer, compression_ratio=0.5, budget="uniform")
    output = model(ids, **cache_argument(cache))
    assert torch.equal(output.logits, before)
    assert cache.get_seq_length() == 60
    assert [layer.num_slots for layer in cache.layers] == [30, 30]
    for mine, theirs in zip(shown, expected, strict=True):
        torch.testing.assert_close(mine[0], theirs, rtol=1e-4, atol=1e-5)


def leaving_out(layer, weights, values):
    """`[H, L]`: each token is taken from each head in turn, which is normalized and projected anew, in fp64."""
    parts = layer.self_attn.o_proj.weight.double().unflatten(1, (len(weights), -1))  # [hidden, Hq, D]
    weights, values = weights.double(), values.double().repeat_interleave(len(weights) // len(values), dim=0)
    outputs = torch.einsum("nhd,hqd->hqn", parts, weights @ values)  # of each head
    lengths, heads = outputs.sum(dim=0).norm(dim=-1), []
    changes = torch.zeros(weights.shape)
    for token in range(weights.shape[2]):
        left = weights.clone()
        left[..., token] = 0
        left /= left.sum(dim=-1, keepdim=True)
        changes[..., token] = (torch.einsum("nhd,hqd->hqn", parts, left @ values) - outputs).norm(dim=-1)
    heads = changes.unflatten(0, (-1, 2)).sum(dim=1) / lengths[:, None]  # two query heads for each KV head
    return heads.square().sum(dim=1)


@pytest.mark.parametrize("chunk_size", [2048, 25])
@torch.no_grad()
def test_scores_are_what_changes_in_a_second_pass_without_each_token(chunk_size, monkeypatch):
    model, ids, shown = llama("eager"), prompt(60), []
    expected = [0, 0]
    for piece in ids.split(chunk_size, dim=1):
        cache = DynamicCache(config=model.config)
        model(ids, **cache_argument(cache))
        found = model(piece, **cache_argument(cache), output_attentions=True).attentions
        for number, layer in enumerate(model.model.layers):
            expected[number] += leaving_out(layer, found[number][0], cache.layers[number].values[0])[:, :60]
    score = LeaveOneOutScorer.score
    monkeypatch.setattr(LeaveOneOutScorer, "score", lambda *args: shown.append(score(*args)) or shown[-1])
    cache = rereading(model, "leave_one_out", chunk_size=chunk_size, compression_ratio=0.5, budget="uniform")
    model(ids, **cache_argument(cache))
    for mine, theirs in zip(shown, expected, strict=True):
        torch.testing.assert_close(mine[0], theirs.float(), rtol=1e-3, atol=1e-6)


@BOTH
@pytest.mark.parametrize("budget", ["uniform", "adakv", "global"])
@pytest.mark.parametrize("chunk_size", [2048, 16])
def test_padded_rows_equal_the_row_alone(budget, chunk_size, name):
    model, lengths = llama(), [50, 31, 12]
    inputs = left_padded(lengths)
    options = {"budget": budget, "chunk_size": chunk_size, "max_tokens": 14}
    together = greedy(model, inputs, **cache_argument(rereading(model, name, **options)))
    for row, length in enumerate(lengths):
        ids = inputs["input_ids"][row : row + 1, -length:]
        alone = greedy(model, ids, **cache_argument(rereading(model, name, **options)))
        for mine, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(mine[row], theirs[0], rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_late_folds_embeddings_and_readings_give_the_same(kind, name):
    model, ids = llama(), prompt(60)
    options = {"merger": "auto", "compression_ratio": 0.75}
    expected = rereading(model, name, kind, **options)
    model(ids, **cache_argument(expected))
    late = rereading(model, name, kind, fold_at="decode", **options)
    for piece in ids.split(23, dim=1):
        model(piece, **cache_argument(late))
    assert late.layers[0].num_slots == 0
    late.fold()
    embedded = rereading(model, name, kind, **options)
    model(inputs_embeds=model.get_input_embeddings()(ids), **cache_argument(embedded))
    filled = Reading(model, ids).fill(rereading(model, name, kind, **options))
    for cache, tolerance in ((late, 1e-4), (embedded, 0), (filled, 0)):
        for mine, theirs in zip(cache.layers, expected.layers, strict=True):
            assert torch.equal(mine.positions, theirs.positions)
        if kind == "dynamic":
            assert_same_cache(cache, expected, rtol=tolerance, atol=tolerance)


@BOTH
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "phi3", "mixtral", *LINEAR])
def test_other_architectures(family, name):
    model, ids = tiny_model(family), prompt(60)
    cache = rereading(model, name, compression_ratio=0.5)
    plain = greedy(model, ids, new_tokens=1, **cache_argument(DynamicCache(config=model.config)))
    output = greedy(model, ids, new_tokens=4, **cache_argument(cache))
    assert torch.equal(output.logits[0], plain.logits[0])
    heads = [layer.shape.heads for layer in cache.folding_layers]
    assert sum(int(layer.slots_per_head.sum()) for layer in cache.folding_layers) == 30 * sum(heads)


@BOTH
def test_turns_beams_and_drafts(name):
    model, ids = llama(), prompt(20).repeat(1, 3)
    cache = rereading(model, name, compression_ratio=0.5)
    first = greedy(model, ids, **cache_argument(cache)).sequences
    second = torch.cat([first, prompt(30, seed=3)], dim=1)
    greedy(model, second, **cache_argument(cache))
    seen = second.shape[1]
    assert sum(int(layer.slots_per_head.sum()) for layer in cache.layers) == seen // 2 * 4
    beams = greedy(
        model, ids, **cache_argument(rereading(model, name)), num_beams=3, output_logits=False, output_scores=True
    )
    assert beams.sequences.shape == (1, 68)
    drafted, plain = rereading(model, name, fold_at="decode"), rereading(model, name, fold_at="decode")
    greedy(model, ids, **cache_argument(drafted), prompt_lookup_num_tokens=3, output_logits=False)
    greedy(model, ids, **cache_argument(plain))
    assert drafted.layers[0].num_slots


@torch.no_grad()
def test_what_cannot_be_read_again_is_refused():
    model, ids = llama(), prompt(40)
    cache = rereading(model, fold_at="decode", compression_ratio=0.5)
    model(ids, **cache_argument(cache))
    cache.release()
    with pytest.raises(ValueError, match="KVzipScorer has LlamaForCausalLM read the prompt again, but"):
        cache.fold()
    bart = BartForConditionalGeneration(BartConfig(**BART))
    with pytest.raises(ValueError, match="bart cannot read a prompt again behind itself"):
        rereading(bart)
    assert MergingDynamicCache(model=bart).folding_layers[0].budget == AdaKVBudget()
    planes = llama()
    planes.config.rope_parameters |= {"mrope_section": [2, 3, 3]}
    with pytest.raises(ValueError, match="cannot read a prompt again .* Choose other stages than KVzipScorer"):
        rereading(planes)
    other = llama()
    config = MergingDynamicCache(config=other.config, scorer="kvzip", **WINDOW)
    other(ids, **cache_argument(config))
    with pytest.raises(ValueError, match="must see the attention of Llama"):
        other(prompt(1), **cache_argument(config))


@torch.no_grad()
def test_nothing_is_left_behind():
    """Neither hooks nor tokens that wait; and a context at the end of the model's positions is read again, too."""
    model = llama()
    most = model.config.max_position_embeddings
    cache = rereading(model, compression_ratio=0.5)
    model(prompt(most), **cache_argument(cache))
    assert sum(int(layer.slots_per_head.sum()) for layer in cache.layers) == most // 2 * 4
    assert not cache._shared.again._passes
    decoder = model.get_decoder()
    assert decoder._forward_hooks
    cache.release()
    assert not decoder._forward_hooks
    assert not decoder._forward_pre_hooks


def test_long_prompts_show_a_progress_bar(monkeypatch, capsys):
    monkeypatch.setattr(again, "SHOWN_FROM", 30)
    model = llama()
    model(prompt(40), **cache_argument(rereading(model, compression_ratio=0.5)))
    assert "reading again: 100%" in capsys.readouterr().err


def test_recent_tokens_have_no_more_than_a_part_of_the_slots_unasked():
    """A sixteenth: the last tokens were read again like all others, so their scores say what they are worth."""
    scores = torch.rand(1, 2, 100)
    scores[:, :, 68:] = 0
    states = LayerStates(torch.randn(1, 2, 100, 8), torch.randn(1, 2, 100, 8))
    states = replace(states, remembered={"scorer": Statistics(tokens=scores)})
    for slots, sinks, recent in ((48, 4, 3), (15, 4, 0), (3, 3, 0)):
        kept = Fold(KVzipScorer(), UniformBudget(), DropMerger())(states, slots).positions
        best = scores[0, :, sinks:].topk(slots - sinks - recent).indices + sinks
        for head in range(2):
            expected = {*range(sinks), *range(100 - recent, 100), *best[head].tolist()}
            assert set(kept[0, head].tolist()) == expected
