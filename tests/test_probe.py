"""The scorer that a model teaches with its first prompt: the fit against least squares, scores against loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from merging_cache import LayerStates, MergingConfig, MergingDynamicCache, Reading, forget, merging_attention
from merging_cache.model import cache_argument, rotary_of
from merging_cache.scorers import KeyDiffScorer, ProbeScorer
from merging_cache.scorers.probe import fitted
from models import WINDOW, assert_same_cache, llama, prompt, tiny_model, watch_passes

pytestmark = pytest.mark.core
PROBE = {"name": "probe", "probe_tokens": 24}


def probed(model, **options):
    return MergingDynamicCache(model=model, **{"scorer": PROBE, "merger": "drop"} | WINDOW | options)


# The fit --------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_the_fit_is_ridge_regression_of_logarithms(count, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2, count, dim, generator=generator) * 3 + 5
    changes = torch.randn(2, count, generator=generator).exp()
    for head, found in enumerate(fitted(inputs, changes)):
        x, y = inputs[head].double(), changes[head].double().log()
        spread = x.std(dim=0, correction=0)
        # rows that ask for weights of zero, as many times as there are tokens
        rows = torch.cat([(x - x.mean(dim=0)) / spread, math.sqrt(count) * torch.eye(dim, dtype=torch.double)])
        wanted = torch.cat([y - y.mean(), torch.zeros(dim, dtype=torch.double)])
        weights = torch.linalg.lstsq(rows, wanted.unsqueeze(1), driver="gelsd").solution.squeeze(1) / spread
        expected = torch.cat([weights, (y.mean() - weights @ x.mean(dim=0)).view(1)])
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_nothing_goes_by_what_never_varies():
    inputs, changes = torch.randn(1, 30, 3), torch.rand(1, 30)
    inputs[..., 1] = 7.0
    weights = fitted(inputs, changes)
    assert weights[0, 1] == 0
    torch.testing.assert_close(weights[:, [0, 2, 3]], fitted(inputs[..., [0, 2]], changes))


def test_one_token_says_what_is_usual_and_none_says_nothing():
    inputs = torch.randn(2, 1, 3)
    once = fitted(inputs, torch.tensor([[0.5], [0.0]]))
    assert once[:, :3].eq(0).all()
    assert once[:, 3].tolist() == pytest.approx([math.log(0.5), math.log(1e-8)])  # never minus infinity
    assert fitted(inputs[:, :0], torch.zeros(2, 0)).tolist() == [[0.0] * 4] * 2


# The scores -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_products_with_keys_before_rope_and_values(family, monkeypatch):
    """However many tokens are looked at a time; without a rotary embedding with the keys as they are."""
    model, generator = tiny_model(family), torch.Generator().manual_seed(3)
    module = next(part for name, part in model.named_modules() if name.endswith((".self_attn", ".attn")))
    with merging_attention(model):
        rotary = rotary_of(module, torch.empty(0)) if family == "llama" else None
    keys, values = torch.randn(2, 1, 2, 30, 16, generator=generator)
    positions = torch.stack([torch.arange(30) * (head + 1) for head in range(2)]).unsqueeze(0)
    lesson = torch.randn(1, 2, 33, generator=generator)
    for places in (positions, positions[:, :1].expand(-1, 2, -1)):
        states = LayerStates(keys, values, places, rotary=rotary, lesson=lesson)
        scores = ProbeScorer().score(states)
        for head in range(2):
            for token in range(30):
                key = keys[0, head, token]
                if rotary is not None:
                    key = reference.rotation(int(places[0, head, token]), 16).float().T @ key
                said = torch.cat([key, values[0, head, token], torch.ones(1)]) @ lesson[0, head]
                assert scores[0, head, token].item() == pytest.approx(said.item(), abs=2**-11 + 1e-4)
        monkeypatch.setattr("merging_cache.scorers.probe.TILE", 100)
        torch.testing.assert_close(ProbeScorer().score(states), scores, rtol=0, atol=2**-10)
        monkeypatch.undo()
        part = states.of_heads(slice(1, 2))
        part = LayerStates(part.keys, part.values, part.positions, rotary=rotary, lesson=lesson[:, 1:])
        torch.testing.assert_close(ProbeScorer().score(part), scores[:, 1:], rtol=0, atol=2**-10)


def test_lessons_go_with_their_rows_and_heads():
    lesson = torch.arange(12.0).view(2, 2, 3)
    states = LayerStates(*torch.randn(2, 2, 2, 5, 4), lessons={"scorer": lesson, "budget": lesson[:1]})
    assert torch.equal(states.for_stage("scorer").lesson, lesson)
    assert states.for_stage("merger").lesson is None
    row = states.select(torch.tensor([1]), torch.arange(3))
    assert torch.equal(row.lessons["scorer"], lesson[1:])
    assert torch.equal(row.lessons["budget"], lesson[:1])  # one row stands for all
    assert torch.equal(row.of_heads(slice(1, 2)).lessons["scorer"], lesson[1:, 1:])


# What is learned ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_teaches_what_its_second_reading_says():
    """The weights are those of a fit to what each token that tells was told, of its key before RoPE and its value."""
    model, ids, told = llama(), prompt(80), {}

    class Watched(ProbeScorer):
        def learn(self, layers, gather, different):
            assert different == len(set(ids[0, middle].tolist())) / 12
            told.update(enumerate(layers))
            return super().learn(layers, gather, different)

    cache = MergingDynamicCache(model=model, scorer=Watched(24), budget="uniform", merger="drop", **WINDOW)
    middle = torch.arange(40, 52)  # the later half of 24 of 80
    model(ids, **cache_argument(cache))
    full = MergingDynamicCache(model=model, compression_ratio=0)
    model(ids, **cache_argument(full))
    for number, states in told.items():
        keys, values = full.layers[number].keys[0, :, middle], full.layers[number].values[0, :, middle]
        assert torch.equal(states.keys[0], keys)
        assert torch.equal(states.values[0], values)
        turned = torch.stack([reference.rotation(int(place), 16).float().T for place in middle])
        inputs = torch.cat([(turned @ keys.unsqueeze(-1)).squeeze(-1), values], dim=-1)
        changes = states.statistics.tokens[0]
        assert changes.min() > 0
        lesson = cache._shared.learned["scorer"].lesson.tables[number][0]
        torch.testing.assert_close(lesson, fitted(inputs, changes), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_both_stages_learn_of_one_reading(monkeypatch):
    """As many tokens are read again as the one that wants more of them asks for, and once for the model."""
    model = llama()
    read = watch_passes(monkeypatch, model)
    cache = probed(model, compression_ratio=0.5, budget={"name": "profile", "probe_tokens": 8})
    model(prompt(80), **cache_argument(cache))
    assert read == [80, 24]
    assert not any(layer._observed.remembered for layer in cache.folding_layers)  # it is not kept
    budget = {"name": "profile", "probe_tokens": 8}
    model(prompt(90, seed=3), **cache_argument(probed(model, compression_ratio=0.5, budget=budget)))
    later = probed(model, compression_ratio=0.75, budget=budget)
    model(prompt(70, seed=4), **cache_argument(later))
    assert read == [80, 24, 90, 24, 70]
    assert later._shared.learned["scorer"].lesson is cache._shared.link.memory[repr(ProbeScorer(24))].lesson


@torch.no_grad()
def test_what_two_prompts_teach_is_the_mean():
    """In all stages, also in those that know enough after the first as long as others have the model read again."""
    model, budget, alone = llama(), {"name": "profile", "probe_tokens": 8}, []

    def read(seed):
        cache = probed(model, compression_ratio=0.5, budget=budget)
        model(prompt(80, seed=seed), **cache_argument(cache))
        return cache._shared.learned

    for seed in (1, 2):
        alone.append(read(seed))
        forget(model)
    read(1), read(2)
    together = probed(model, compression_ratio=0.5, budget=budget)._shared.learned
    for name in ("scorer", "budget"):
        lessons = [one[name].lesson.tables for one in (*alone, together)]
        for first, second, both in zip(*lessons, strict=True):
            torch.testing.assert_close(both, (first + second) / 2)


@torch.no_grad()
def test_the_same_prompt_again_is_not_read_again(monkeypatch):
    """It tells what it told, in a batch, too; another one is read."""
    model = llama()
    read = watch_passes(monkeypatch, model)
    ids = prompt(80, batch=2)
    caches = [probed(model, budget="uniform", compression_ratio=0.5) for _ in range(3)]
    for cache, rows in zip(caches, (ids[:1], ids[:1], ids[1:]), strict=True):
        model(rows, **cache_argument(cache))
    assert read == [80, 24, 80, 80, 24]
    assert_same_cache(caches[1], caches[0])
    forget(model)
    read.clear()
    batches = [probed(model, attention_mask=torch.ones_like(ids), budget="uniform") for _ in range(3)]
    for cache, rows in zip(batches, (ids, ids, ids.flip(0)), strict=True):
        model(rows, **cache_argument(cache))
    assert read == [80, 24, 80, 80]
    assert_same_cache(batches[1], batches[0])
    assert not any(layer._observed.remembered for layer in caches[1].folding_layers)


@torch.no_grad()
@pytest.mark.parametrize("budget", ["uniform", "adakv", "global", "profile"])
def test_a_fold_that_learned_is_a_fold_that_knew(budget):
    model, ids = llama(), prompt(120)
    learning, knowing = (probed(model, budget=budget, compression_ratio=0.5) for _ in range(2))
    for cache in (learning, knowing):
        model(ids, **cache_argument(cache))
    assert_same_cache(knowing, learning)
    filled = Reading(model, ids).fill(probed(model, budget=budget, compression_ratio=0.5))
    assert_same_cache(filled, learning)


def test_the_default_is_what_the_model_allows():
    states = LayerStates(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8))
    assert torch.equal(ProbeScorer().score(states), KeyDiffScorer().score(states))  # as long as nothing is known
    names = [type(MergingConfig().build(*given).scorer).__name__ for given in ((False, True), (True, False))]
    assert names == ["KeyDiffScorer", "KeyDiffScorer"]
    fold = MergingConfig().build(linked=True, rereadable=True)
    assert (type(fold.scorer).__name__, type(fold.budget).__name__) == ("ProbeScorer", "ProfileBudget")
    assert MergingConfig.from_dict(MergingConfig().to_dict()) == MergingConfig()


@torch.no_grad()
def test_a_scorer_around_it_learns_and_hands_on(monkeypatch):
    """What wraps a scorer is taught in its place, once for a prompt."""
    model = llama()
    read = watch_passes(monkeypatch, model)
    wrapping = {"name": "chunk_kv", "scorer": PROBE, "chunk_length": 1}
    caches = []
    for scorer in (wrapping, wrapping, PROBE):
        caches.append(probed(model, scorer=scorer, budget="uniform", compression_ratio=0.5))
        model(prompt(80), **cache_argument(caches[-1]))
    assert read == [80, 24, 80, 80, 24]
    lessons = [cache._shared.learned["scorer"].lesson.tables for cache in caches]
    for tables in zip(*lessons, strict=True):
        assert torch.equal(tables[0], tables[1])
        assert torch.equal(tables[0], tables[2])


@torch.no_grad()
def test_short_prompts_give_the_same_again_and_add_up():
    """As long as little is known each goes by itself alone; different ones teach later caches together."""
    model = llama()

    def read(seed, length=16):
        cache = probed(model, budget="uniform", compression_ratio=0.5)
        model(prompt(length, seed=seed), **cache_argument(cache))
        return cache

    first = read(0)
    assert_same_cache(read(0), first)
    assert read(0)._shared.is_to_be_read_again  # 8 tokens of 24, however often
    memory = first._shared.link.memory[repr(ProbeScorer(24))]
    assert memory.worth == 8
    read(1), read(2), read(3)
    later = probed(model, budget="uniform", compression_ratio=0.5)
    assert not later._shared.is_to_be_read_again
    taught = later._shared.link.memory[repr(ProbeScorer(24))]
    assert taught.worth >= 24
    assert len(taught.words) > len(memory.words)


@torch.no_grad()
def test_the_same_prompt_again_teaches_nothing():
    """Warming up and signs of life; the lesson stays that of the text."""
    model = llama()
    clean, ids = llama(), prompt(80, seed=5)
    for _ in range(9):
        model(torch.full((1, 60), 7), **cache_argument(probed(model, budget="uniform", compression_ratio=0.5)))
    caches = [probed(one, budget="uniform", compression_ratio=0.5) for one in (model, clean)]
    for one, cache in zip((model, clean), caches, strict=True):
        assert cache._shared.is_to_be_read_again
        one(ids, **cache_argument(cache))
    memory = [cache._shared.link.memory[repr(ProbeScorer(24))] for cache in caches]
    assert [one.worth for one in memory] == [12, 12]
    forget(model)
    assert probed(model)._shared.is_to_be_read_again


@torch.no_grad()
def test_prompts_that_repeat_themselves_speak_for_themselves_only(monkeypatch):
    """However many there are; a text that comes then teaches what it would have taught at once."""
    model = llama()
    read = watch_passes(monkeypatch, model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        cache = probed(model, budget="uniform", compression_ratio=0.5)
        model(torch.randint(1, 3, (1, 30), generator=generator), **cache_argument(cache))
    assert read == [30, 24] * 40
    fresh, lessons = llama(), []
    for one in (model, fresh):
        for seed in (5, 6):
            one(prompt(80, seed=seed), **cache_argument(probed(one, budget="uniform", compression_ratio=0.5)))
        knowing = probed(one, budget="uniform", compression_ratio=0.5)
        assert not knowing._shared.is_to_be_read_again
        lessons.append(knowing._shared.learned["scorer"].lesson.tables)
    assert all(torch.equal(*pair) for pair in zip(*lessons, strict=True))


@torch.no_grad()
def test_what_says_the_same_again_and_again_says_nothing():
    """Then `keydiff` scores, as if nothing were known; in a batch only that row."""
    model, length = llama(), 160
    again = torch.randint(1, 3, (1, length), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([again, prompt(length, seed=5)])
    options = {"scorer": {"name": "probe", "probe_tokens": 48}, "budget": "uniform", "compression_ratio": 0.5}
    together = probed(model, attention_mask=torch.ones_like(ids), **options)
    model(ids, **cache_argument(together))
    forget(model)
    alone = probed(model, **options)
    model(ids[1:], **cache_argument(alone))
    keydiff = probed(model, **options | {"scorer": "keydiff", "recent_tokens": 5})  # a sixteenth of 80 slots
    model(again, **cache_argument(keydiff))
    for both, mine, theirs in zip(together.layers, keydiff.layers, alone.layers, strict=True):
        assert torch.equal(both.positions[0], mine.positions[0])
        assert torch.equal(both.positions[1], theirs.positions[0])
    # a text that comes then is all that is known
    forget(model)
    short = again[:, :60], prompt(60, seed=5)
    cache = probed(model, **options)
    for piece in short:
        model(piece, **cache_argument(cache))
    assert not any(table.isnan().any() for table in cache._shared.learned["scorer"].lesson.tables)


def test_a_lesson_keeps_no_graph():
    """Of the keys and values that it was made of, where someone trains."""
    model = llama()
    cache = probed(model, compression_ratio=0.5)
    model(prompt(80), **cache_argument(cache))
    for one in cache._shared.learned.values():
        assert not any(table.requires_grad for table in one.lesson.tables)
        assert not any(table.requires_grad for table in cache._shared.link.memory[repr(one.stage)].lesson.tables)


@torch.no_grad()
def test_auto_inside_of_another_scorer_is_what_it_is_alone():
    wrapped = {"name": "chunk_kv", "scorer": "auto", "chunk_length": 4}
    fold = MergingConfig(scorer=wrapped).build(linked=True)
    assert type(fold.scorer.inner).__name__ == "ProbeScorer"
    assert type(fold.budget).__name__ == "ProfileBudget"
    assert type(MergingConfig(scorer=wrapped).build().scorer.inner).__name__ == "KeyDiffScorer"


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"merger": "drop"}, {"scorer": "keydiff", "budget": "adakv", "merger": "drop"}]
)
def test_double_precision(options):
    model, ids = llama().double(), prompt(80)
    cache = MergingDynamicCache(model=model, compression_ratio=0.5, **WINDOW, **options)
    model(ids, **cache_argument(cache))
    assert model(prompt(1), **cache_argument(cache)).logits.isfinite().all()
