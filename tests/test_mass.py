"""Mergers that keep attention mass: exact where they can be, each against attention written out in float64."""

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import reference
from architectures import tiny_model
from merging_cache import MERGERS, LayerStates, MergingDynamicCache, Scorer, Survivors, merging_attention
from merging_cache.mergers import (
    CAMMerger,
    CountMerger,
    DropMerger,
    MassMerger,
    RefitMerger,
    ResidualMerger,
    SimilarityMerger,
    ValidatedMerger,
)
from merging_cache.mergers import reference as by_reference
from merging_cache.mergers.queries import StratifiedQueries
from merging_cache.model import attention, cache_argument
from merging_cache.states import ReferenceQueries, top_tokens
from models import WINDOW, greedy, left_padded, llama, prompt

pytestmark = pytest.mark.core


def output(queries, keys, values, log_mass=None):
    """`[B, H, G, n, D]` queries over `[B, H, S, D]` tokens that all of them see, in float64."""
    logits = queries.double() @ keys.double().unsqueeze(2).mT * keys.shape[-1] ** -0.5
    if log_mass is not None:
        logits = logits + log_mass.double()[:, :, None, None]
    return logits.softmax(-1) @ values.double().unsqueeze(2)


def some_states(length, batch=2, heads=3, group=2, asked=5, dim=8):
    """Random states, and queries after all tokens."""
    states = LayerStates(torch.randn(batch, heads, length, dim), torch.randn(batch, heads, length, dim))
    queries = torch.randn(batch, heads * group, asked, dim)
    return replace(states, queries=queries, query_positions=torch.arange(length, length + asked))


def grouped(states):
    return states.queries.unflatten(1, (states.keys.shape[1], -1))


def keep(states, count, protect=0):
    indices = top_tokens(torch.rand(states.positions.shape), count)
    protected = torch.arange(count).expand(indices.shape) < protect
    return Survivors(indices, protected=protected)


# Counting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["cosine", "distance"])
def test_equal_keys_cost_nothing(routing):
    """Each distinct key stored once gives the output of all of them."""
    states = some_states(8)
    copies = torch.randperm(8 * 5) % 8
    many = replace(states, keys=states.keys[:, :, copies], values=torch.randn(2, 3, 40, 8), positions=None)
    first = torch.tensor([copies.tolist().index(i) for i in range(8)]).sort().values
    slots = CountMerger(routing=routing).merge(many, Survivors(first.expand(2, 3, -1)))
    assert slots.keys.shape[2] == 8
    given, wanted = (
        output(grouped(states), *one) for one in ((slots.keys, slots.values, slots.log_mass), (many.keys, many.values))
    )
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(slots.log_mass.exp().sum(-1), torch.full((2, 3), 40.0))


class FirstOfEach(Scorer):
    """The first token of each kind, told by its key."""

    def score(self, states):
        same = (states.keys.unsqueeze(3) - states.keys.unsqueeze(2)).abs().amax(-1) < 1e-5
        return 1.0 - same.tril(-1).any(-1).float()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equal_tokens_cost_nothing_in_a_model_without_positions(attention):
    """One layer of GPT-2 whose position embeddings are 0: 60 tokens of 9 kinds in 9 slots, several steps and tokens."""
    model = tiny_model("gpt2", layers=1, attention=attention)
    model.transformer.wpe.weight.zero_()
    ids = torch.randint(5, 14, (2, 60))
    ids[:, :9] = torch.arange(5, 14)
    options = {"scorer": FirstOfEach(), "merger": "count", "max_tokens": 9, "sink_tokens": 0, "recent_tokens": 0}
    cache, full = MergingDynamicCache(model=model, **options), DynamicCache(config=model.config)
    for piece in (ids, prompt(1, 2), prompt(1, 2, seed=1)):
        given = model(piece, **cache_argument(cache)).logits
        torch.testing.assert_close(given, model(piece, **cache_argument(full)).logits, rtol=0, atol=1e-5)
    assert cache.layers[0].num_slots == 9
    assert full.layers[0].keys.shape[2] == 62


def test_count_equals_loops():
    states = some_states(20, batch=1, heads=2)
    for threshold in (0.0, 0.3):
        survivors = keep(states, 7, protect=2)
        slots = CountMerger(similarity_threshold=threshold).merge(states, survivors)
        for head in range(2):
            keys, values = (one[0, head].double().tolist() for one in (states.keys, states.values))
            kept = survivors.indices[0, head].tolist()
            groups = {j: [j] for j in kept}
            for i in set(range(20)) - set(kept):
                j = max(kept[2:], key=lambda j: (reference.cosine(keys[i], keys[j]), j))
                if reference.cosine(keys[i], keys[j]) >= threshold:
                    groups[j].append(i)
            for slot, j in enumerate(kept):
                mean = [sum(values[i][d] for i in groups[j]) / len(groups[j]) for d in range(8)]
                torch.testing.assert_close(slots.values[0, head, slot], torch.tensor(mean))
                assert slots.log_mass[0, head, slot].exp().item() == pytest.approx(len(groups[j]))
            assert slots.num_merged[0, head] == sum(map(len, groups.values())) - 7
            assert slots.num_merged[0, head] + slots.num_dropped[0, head] == 13


@given(st.integers(0, 10_000), st.floats(-1, 1), st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_mass_is_conserved(seed, threshold, sizes):
    """Over several folds: what the slots stand for, and what was dropped, is all that was seen."""
    torch.manual_seed(seed)
    merger, seen, dropped, states = CountMerger(similarity_threshold=threshold), 0, 0, None
    for size in sizes:
        new = some_states(size, batch=1, heads=2)
        seen += size
        if states is not None:
            log_mass = torch.cat([states.log_mass, torch.zeros(1, 2, size)], 2)
            keys, values = (torch.cat([getattr(states, n), getattr(new, n)], 2) for n in ("keys", "values"))
            new = LayerStates(keys, values, log_mass=log_mass)
        kept = max(1, new.num_tokens // 2)
        slots = merger.merge(new, keep(new, kept, protect=kept // 4))
        dropped = dropped + slots.num_dropped
        mass = torch.zeros(slots.positions.shape) if slots.log_mass is None else slots.log_mass
        states = LayerStates(slots.keys, slots.values, log_mass=mass)
    torch.testing.assert_close(states.log_mass.exp().sum(-1) + dropped, torch.full((1, 2), float(seen)))


# Observed attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["keys", "attention"])
def test_one_token_is_exact_for_one_query(routing):
    states = some_states(12, group=1, asked=1)
    merger = MassMerger(queries="last", routing=routing, max_ratio=1e9, max_added=1e9)
    slots = merger.merge(states, keep(states, 11))
    given = output(grouped(states), slots.keys, slots.values, slots.log_mass)
    wanted = output(grouped(states), states.keys, states.values)
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-6)


def test_constant_gaps_are_exact_for_all_queries():
    """Tokens whose logits differ from their survivor's by the same for every query."""
    states = some_states(6, group=2, asked=7)
    direction = torch.nn.functional.normalize(torch.randn(8), dim=0)
    queries = states.queries - (states.queries @ direction - 1).unsqueeze(-1) * direction  # all alike along it
    gaps = torch.randn(2, 3, 6, 1)
    keys = torch.cat([states.keys, states.keys + gaps * direction], dim=2)
    many = replace(states, keys=keys, values=torch.randn(2, 3, 12, 8), queries=queries, positions=None)
    many = replace(many, query_positions=torch.arange(12, 19))
    merger = MassMerger(queries="last", routing="attention", max_ratio=1e9, max_added=1e9)
    slots = merger.merge(many, Survivors(torch.arange(6).expand(2, 3, -1)))
    given = output(grouped(many), slots.keys, slots.values, slots.log_mass)
    torch.testing.assert_close(given, output(grouped(many), many.keys, many.values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("routing", ["keys", "attention"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"least_explained": 0.6},
        {"max_ratio": 0.5},
        {"max_added": 0.8},
        {"max_ratio": 1e9, "max_added": 1e9},
        {"lookup_share": 0.3},
        {"similarity_threshold": 0.2},
    ],
)
def test_mass_equals_loops(routing, options):
    full = {"least_explained": 0.0, "max_ratio": 3.0, "max_added": 30.0, "lookup_share": 0.0} | options
    least_similar = options.get("similarity_threshold", -1.0)
    states = some_states(18, batch=1, heads=2)
    states = replace(states, log_mass=torch.rand(1, 2, 18))
    survivors = keep(states, 6, protect=1)
    slots = MassMerger(queries="last", routing=routing, **full).merge(states, survivors)
    for head in range(2):
        keys, values = states.keys[0, head].double(), states.values[0, head].double()
        queries = grouped(states)[0, head].flatten(0, 1).double()
        columns = (queries @ keys.T * 8**-0.5 + states.log_mass[0, head]).softmax(-1).T
        kept = survivors.indices[0, head].tolist()
        variance = (values - values.mean(0)).square().sum(-1).mean()
        features = keys if routing == "keys" else columns
        ratios = {j: {} for j in kept}
        for i in set(range(18)) - set(kept):
            j = max(kept[1:], key=lambda j: torch.cosine_similarity(features[i], features[j], dim=0).item())
            both, own, other = (
                float(a @ b) for a, b in ((columns[i], columns[j]), (columns[i],) * 2, (columns[j],) * 2)
            )
            similar = routing == "attention" or torch.cosine_similarity(keys[i], keys[j], dim=0) >= least_similar
            looked_up = full["lookup_share"] / 18 * (values[i] - values[j]).square().sum() / variance
            if both**2 / own / other >= full["least_explained"] and similar:
                ratios[j][i] = min(both / (other + len(queries) * float(looked_up)), full["max_ratio"])
        for slot, j in enumerate(kept):
            total = sum(ratios[j].values())
            scale = min(1.0, full["max_added"] / total) if total else 1.0
            value = values[j] + sum(scale * r * values[i] for i, r in ratios[j].items())
            torch.testing.assert_close(
                slots.values[0, head, slot].double(), value / (1 + scale * total), rtol=1e-4, atol=1e-5
            )
            expected = states.log_mass[0, head, j].item() + torch.tensor(scale * total).log1p().item()
            assert slots.log_mass[0, head, slot].item() == pytest.approx(expected, abs=1e-4)


def test_by_default_nothing_is_folded_into_a_key_that_is_unlike():
    """However little attention both drew: what draws it later is another query."""
    states = some_states(18, batch=1, heads=2)
    survivors = keep(states, 6)
    slots = RefitMerger(queries="last").merge(states, survivors)
    alike = torch.cosine_similarity(states.keys.unsqueeze(3), states.keys.unsqueeze(2), dim=-1)  # [B, H, L, L]
    kept = survivors.mask(18)
    nearest = alike.masked_fill(~kept.unsqueeze(2), -1).amax(dim=-1)
    like = (~kept & (nearest >= 0.5)).sum(dim=-1)
    assert (slots.num_merged <= like).all()
    assert (slots.num_merged + slots.num_dropped == 12).all()
    assert (slots.log_mass.exp().sum(dim=-1) > 6)[like > 0].all()
    assert 0 < like.sum() < 24


@pytest.mark.parametrize(
    "options",
    [{"max_added": float("inf")}, {"max_added": 0.0, "max_ratio": 0.0}, {"max_added": 0.0, "least_explained": 0.9}],
)
def test_extreme_caps_leave_no_nan(options):
    states = some_states(20)
    survivors = keep(states, 6)
    slots = MassMerger(queries="last", **options).merge(states, survivors)
    assert slots.values.isfinite().all()
    assert slots.log_mass.isfinite().all()
    if options["max_added"] == 0:
        assert torch.equal(slots.values, DropMerger().merge(states, survivors).values)
        assert not slots.log_mass.any()
        assert not slots.num_merged.any()


def test_heads_are_merged_a_few_at_a_time(monkeypatch):
    states = some_states(30)
    survivors = keep(states, 9, protect=2)
    whole = MassMerger(queries="last").merge(states, survivors)
    monkeypatch.setattr(by_reference, "TILE", 1)
    parts = MassMerger(queries="last").merge(states, survivors)
    for name in ("keys", "values", "log_mass", "positions", "num_merged", "num_dropped"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_similarity_may_carry_mass():
    states = some_states(20)
    survivors = keep(states, 8)
    plain, massive = (SimilarityMerger(log_mass=mass).merge(states, survivors) for mass in (False, True))
    assert torch.equal(plain.values, massive.values)
    assert plain.log_mass is None
    weights = SimilarityMerger()._route(states, survivors)
    for head in range(3):
        for slot in range(8):
            total = weights.weight[0, head][weights.target[0, head] == slot].sum()
            torch.testing.assert_close(massive.log_mass[0, head, slot], total.log1p())


@pytest.mark.parametrize("merger", [CountMerger(), MassMerger(queries="last"), SimilarityMerger(log_mass=True)])
def test_nothing_to_evict_changes_nothing(merger):
    states = replace(some_states(9), log_mass=torch.rand(2, 3, 9))
    slots = merger.merge(states, Survivors(torch.arange(9).expand(2, 3, -1)))
    for name in ("keys", "values", "log_mass", "positions"):
        assert torch.equal(getattr(slots, name), getattr(states, name))
    assert not slots.num_merged.any()
    assert not slots.num_dropped.any()


@pytest.mark.parametrize("merger", ["count", "mass", {"name": "similarity", "log_mass": True}])
def test_mass_needs_the_model(merger):
    model = llama()
    cache = MergingDynamicCache(config=model.config, merger=merger, **WINDOW)
    model(prompt(40), **cache_argument(cache))
    with pytest.raises(ValueError, match=r"\w+Merger must see the attention of Llama"):
        model(prompt(1), **cache_argument(cache))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_no_more_than_the_mask(dtype, monkeypatch):
    """The output of a step is off by the rounding of the mask, and by what the same kernel is off without mass."""
    model = llama().to(dtype)
    cache = MergingDynamicCache(model=model, merger="count", budget="uniform", **WINDOW)
    model(prompt(60), **cache_argument(cache))
    layer = cache.layers[0]
    assert layer.log_mass.dtype == torch.float32
    seen = layer.log_mass.exp().sum(-1) + layer.num_dropped
    torch.testing.assert_close(seen, torch.full((1, 2), 60.0), rtol=1e-4, atol=1e-3)

    steps = []
    run = attention._run

    def recorded(implementation, module, query, key, value, mask, **kwargs):
        result = run(implementation, module, query, key, value, mask, **kwargs)[0]
        without = run(implementation, module, query, key, value, torch.zeros_like(mask), **kwargs)[0]
        steps.append((query, key, value, result, without))
        return result, None

    monkeypatch.setattr(attention, "_run", recorded)
    model(prompt(1), **cache_argument(cache))
    query, key, value, result, without = steps[0]
    grouped_query = query.unflatten(1, (2, -1))

    def exact(log_mass):
        return output(grouped_query, key, value, log_mass).flatten(1, 2)

    mass = layer.log_mass
    wanted, rounded, plain = exact(mass), exact(mass.to(dtype)), exact(torch.zeros_like(mass))
    mask_error = (rounded - wanted).abs().max()
    kernel_error = (without.transpose(1, 2).double() - plain).abs().max()
    assert mask_error > 0
    assert (result.transpose(1, 2).double() - wanted).abs().max() <= mask_error + 2 * kernel_error


# Refitted, validated, spread ------------------------------------------------------------------------------------------


def error(states, slots, values=None):
    """The squared error of the reference queries' outputs, `[B, H]`, in float64."""
    values = slots.values if values is None else values
    given = output(grouped(states), slots.keys, values, slots.log_mass)
    return (given - output(grouped(states), states.keys, states.values)).square().sum((2, 3, 4))


@pytest.mark.parametrize("merger", ["drop", "similarity", "count", "mass"])
@pytest.mark.parametrize(
    "options", [{}, {"ridge": 10.0}, {"max_change": 0.01}, {"guarded": 0.5}, {"max_change": 100.0}]
)
def test_refit_never_increases_what_it_fits(merger, options):
    states = some_states(30, asked=7)
    survivors = keep(states, 10, protect=3)
    refit = RefitMerger(queries="last", merger=merger, **options)
    before = refit.inner.merge(replace(states, reference=refit.source.reference(states)), survivors)
    after = refit.merge(states, survivors)
    assert torch.equal(after.keys, before.keys)
    assert (error(states, after) <= error(states, before) * (1 + 1e-5)).all()
    assert torch.equal(after.values[:, :, :3], before.values[:, :, :3])  # protected
    change = (after.values - before.values).norm(dim=(2, 3))
    assert (change <= refit.max_change * before.values.norm(dim=(2, 3)) * (1 + 1e-4)).all()
    if not options:
        assert (error(states, after) < 0.9 * error(states, before)).all()


def test_refit_equals_the_ridge_solution():
    states = some_states(14, batch=1, heads=1, group=1, asked=4)
    survivors = keep(states, 6)
    refit = RefitMerger(queries="last", merger="drop", ridge=0.3, max_change=1e9, guarded=0.0)
    slots, dropped = refit.merge(states, survivors), DropMerger().merge(states, survivors)
    queries, keys = states.queries[0, 0].double(), states.keys[0, 0].double()
    wanted = (queries @ keys.T * 8**-0.5).softmax(-1) @ states.values[0, 0].double()
    x = (queries @ dropped.keys[0, 0].double().T * 8**-0.5).softmax(-1)
    anchor = dropped.values[0, 0].double()
    primal = torch.linalg.solve(x.T @ x + 0.3 * torch.eye(6), x.T @ (wanted - x @ anchor))
    torch.testing.assert_close(slots.values[0, 0].double(), anchor + primal, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.2, 1.0])
def test_validated_is_never_worse_than_drop_on_held_out_queries(margin):
    states = some_states(40, heads=5, asked=12)
    survivors = keep(states, 12, protect=2)
    merger = ValidatedMerger(queries="last", margin=margin)
    slots, dropped = merger.merge(states, survivors), DropMerger().merge(states, survivors)
    held_out = replace(states, queries=states.queries[:, :, ::4])
    mine, theirs = error(held_out, slots), error(held_out, dropped)
    assert (mine <= theirs * (1 + 1e-5)).all()
    changed = (slots.values != dropped.values).any(-1).any(-1)
    assert changed.any() == (margin < 1)
    assert (mine[changed] < (1 - margin) * theirs[changed] * (1 + 1e-5)).all()
    assert torch.equal(slots.num_merged == 0, ~changed)


def test_validated_takes_the_best_for_each_head():
    states = some_states(40, heads=5, asked=12)
    survivors = keep(states, 12)
    names = ["similarity", "count", "mass"]
    slots = ValidatedMerger(queries="last", mergers=names, margin=0.0).merge(states, survivors)
    fitted = replace(
        states,
        reference=ReferenceQueries(states.queries, states.query_positions).pick(
            torch.tensor([i for i in range(12) if i % 4])
        ),
    )
    held_out = replace(states, queries=states.queries[:, :, ::4])
    results = [DropMerger().merge(states, survivors), *(MERGERS[name]().merge(fitted, survivors) for name in names)]
    errors = torch.stack([error(held_out, result) for result in results])
    for row in range(2):
        for head in range(5):
            best = results[errors[:, row, head].argmin()]
            torch.testing.assert_close(slots.values[row, head], best.values[row, head])


def test_cam_equals_loops():
    states = some_states(25, batch=1, heads=2)
    survivors = keep(states, 9, protect=2)
    slots = CAMMerger(queries="last", window=3).merge(states, survivors)
    for head in range(2):
        keys, values = states.keys[0, head].double(), states.values[0, head].double()
        drawn = (grouped(states)[0, head].flatten(0, 1).double() @ keys.T * 8**-0.5).softmax(-1).mean(0)
        kept = survivors.indices[0, head].tolist()
        expected, merged = {j: values[j].clone() for j in kept}, 0
        for i in set(range(25)) - set(kept):
            following = [j for j in kept[2:] if j > i][:3]
            if following:
                p = min(1.0, float(drawn[i] / drawn[following].mean()))
                merged += 1
                for j in following:
                    expected[j] += p * values[i] / len(following)
        for slot, j in enumerate(kept):
            torch.testing.assert_close(slots.values[0, head, slot].double(), expected[j], rtol=1e-4, atol=1e-5)
        assert (slots.num_merged[0, head], slots.num_dropped[0, head]) == (merged, 16 - merged)


@pytest.mark.parametrize("clusters", ["positions", "keys"])
@pytest.mark.parametrize("mass", ["fitted", "count"])
def test_residual_equals_loops(mass, clusters):
    states = some_states(30, batch=1, heads=2)
    survivors = keep(states, 12, protect=2)
    survivors = replace(survivors, scores=torch.rand(1, 2, 12))
    slots = ResidualMerger(queries="last", share=0.3, mass=mass, clusters=clusters).merge(states, survivors)
    for head in range(2):
        keys, values = states.keys[0, head].double(), states.values[0, head].double()
        queries = grouped(states)[0, head].flatten(0, 1).double()
        logits = queries @ keys.T * 8**-0.5
        attention = logits.softmax(-1)
        kept = survivors.indices[0, head].tolist()
        worst = sorted(range(2, 12), key=lambda k: survivors.scores[0, head, k].item())[:3]
        stay = [j for k, j in enumerate(kept) if k not in worst]
        gone = sorted(set(range(30)) - set(stay))
        expected = {j: (keys[j], values[j], 0.0) for j in stay}
        if clusters == "positions":
            stretches = [gone[s * len(gone) // 3 : (s + 1) * len(gone) // 3] for s in range(3)]
            members = {stretch[-1]: stretch for stretch in stretches}
        else:
            members = {kept[k]: [] for k in worst}
            for i in gone:
                members[min(members, key=lambda j: (keys[i] - keys[j]).norm())].append(i)
        for named, cluster in members.items():
            weights = attention[:, cluster].mean(0) if mass == "fitted" else torch.ones(len(cluster)).double()
            key, value = ((weights @ part[cluster]) / weights.sum() for part in (keys, values))
            x = (queries @ key * 8**-0.5 - logits.logsumexp(-1)).exp()
            fitted = float((attention[:, cluster].sum(-1) * x).sum() / (x * x).sum())
            number = min(max(fitted, 0.01), 2 * len(cluster)) if mass == "fitted" else len(cluster)
            expected[named] = key, value, torch.tensor(number).log().item()
        for slot, (position, (key, value, log_mass)) in enumerate(sorted(expected.items())):
            assert slots.positions[0, head, slot] == position
            torch.testing.assert_close(slots.keys[0, head, slot].double(), key, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(slots.values[0, head, slot].double(), value, rtol=1e-4, atol=1e-5)
            assert slots.log_mass[0, head, slot].item() == pytest.approx(log_mass, abs=1e-4)
        assert (slots.num_merged[0, head], slots.num_dropped[0, head]) == (len(gone) - 3, 0)  # three slots go on


@pytest.mark.parametrize("clusters", ["positions", "keys"])
def test_residual_mass_is_the_count_where_all_keys_are_equal(clusters):
    """Also of clusters that some of the queries do not see, or none of them."""
    states = LayerStates(torch.ones(1, 1, 40, 8), torch.randn(1, 1, 40, 8))
    states = replace(states, queries=torch.randn(1, 1, 20, 8), query_positions=torch.arange(18, 38))
    survivors = Survivors(torch.arange(0, 36, 3).expand(1, 1, -1), scores=torch.rand(1, 1, 12))
    slots = ResidualMerger(queries="last", share=1.0, clusters=clusters).merge(states, survivors)
    torch.testing.assert_close(slots.log_mass.exp().sum(), torch.tensor(40.0))
    for j, mass in zip(slots.tokens[0, 0].tolist(), slots.log_mass[0, 0].exp().tolist(), strict=True):
        assert mass == pytest.approx(round(mass), abs=1e-4), j


def test_residual_slots_remember_their_own_tokens():
    """What a scorer keeps per token follows the token that a slot is named after."""
    model, ids = llama(), prompt(60)
    options = {"model": model, "scorer": "observed_attention", **WINDOW}
    whole = MergingDynamicCache(fold_at="decode", **options)
    model(ids, **cache_argument(whole))
    folded = MergingDynamicCache(merger="residual", **options)
    model(ids, **cache_argument(folded))
    before, after = (cache.layers[0]._remembered["scorer"].tokens for cache in (whole, folded))
    expected = before.gather(2, folded.layers[0].positions.unsqueeze(-1).expand_as(after))
    torch.testing.assert_close(after, expected, rtol=2**-8, atol=0)
    assert folded.layers[0].log_mass.any()


# Reference queries ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 7, 16])
def test_stratified_queries_do_not_depend_on_chunks(chunk):
    """One of every stretch, turned to the positions after the last token."""
    model, ids, source = llama(), prompt(100), StratifiedQueries(count=6)
    shown = []

    class Spy(MassMerger):
        def merge_heads(self, states, survivors):
            shown.append(states.reference)
            return super().merge_heads(states, survivors)

    cache = MergingDynamicCache(model=model, budget="uniform", merger=Spy(queries=source), fold_at="decode", **WINDOW)
    for piece in ids.split(chunk or 100, dim=1):
        model(piece, **cache_argument(cache))
        for layer in cache.layers:
            buffer, where, total = layer._observed.remembered["merger"].queries
            assert buffer.shape[2] == where.shape[2] == 12
    assert (total == 100).all()
    where = cache.layers[0]._observed.remembered["merger"].queries[1]
    model(prompt(1), **cache_argument(cache))
    expected = list(range(7, 100, 8))
    assert where[0, 0, : len(expected)].tolist() == [[position, position + 1] for position in expected]
    assert not where[0, 0, len(expected) :].any()
    # by hand, for the first layer
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids[:, expected]))
    queries = layer.self_attn.q_proj(hidden).unflatten(-1, (-1, 16)).transpose(1, 2).double()
    turned = torch.stack([reference.rotation(100 + i, 16) for i in range(len(expected))])
    expected_queries = torch.einsum("bhnd,ned->bhne", queries, turned)
    torch.testing.assert_close(shown[0].queries.double(), expected_queries, rtol=1e-3, atol=1e-3)
    # once folded none is left, and the next turn has its own; what was generated is not observed
    assert cache.layers[0]._observed.remembered["merger"].queries[0].shape[2] == 0
    model(prompt(30), **cache_argument(cache))
    _, where, total = cache.layers[0]._observed.remembered["merger"].queries
    assert where[0, 0].tolist() == [[100 + order, order] for order in range(4, 29, 4)] + [[0, 0]] * 5
    assert (total == 30).all()
    assert shown[0].positions.tolist() == [list(range(100, 100 + len(expected)))]


@pytest.mark.parametrize("merger", ["count", "mass", "refit", {"name": "mass", "queries": "last"}])
@pytest.mark.parametrize("fold_at", ["prefill", "decode"])
def test_rows_whose_first_chunk_is_padding(merger, fold_at):
    model, by_itself, inputs = llama(), llama(), left_padded([60, 30])
    options = {"merger": merger, "max_tokens": 20, "fold_at": fold_at, **WINDOW}
    together, alone = (MergingDynamicCache(model=one, **options) for one in (model, by_itself))
    mine = greedy(model, inputs, 3, **cache_argument(together), prefill_chunk_size=15)
    theirs = greedy(by_itself, inputs["input_ids"][1:, 30:], 3, **cache_argument(alone), prefill_chunk_size=15)
    torch.testing.assert_close(torch.stack(mine.logits)[:, 1:], torch.stack(theirs.logits), rtol=1e-3, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("merger", ["auto", "residual", "cam", "refit", "validated"])
def test_turns_are_judged_by_their_own_queries(merger):
    """However short they are, and however much is generated between them."""
    model, counts = llama(layers=1), []
    cache = MergingDynamicCache(model=model, merger=merger, budget="uniform")
    merge, kind = type(cache.layers[0].merger).merge, type(cache.layers[0].merger)

    def spy(self, states, survivors):
        counts.append(self.source.reference(states).queries.shape[2])
        return merge(self, states, survivors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "merge", spy)
        for turn, count in enumerate([5, 2, 30, 3, 30, 30]):
            model(prompt(count, seed=turn), **cache_argument(cache))
            for _ in range(40):
                model(prompt(1), **cache_argument(cache))
    assert counts == [5, 2, 30, 3, 30, 30]
    assert cache.layers[0].positions.shape[2] < cache.get_seq_length()


@torch.no_grad()
@pytest.mark.parametrize(
    "merger",
    [
        {"name": "count", "similarity_threshold": 0.5},
        {"name": "mass", "similarity_threshold": 0.5},
        {"name": "mass", "least_explained": 0.9},
        "auto",
        "residual",
        "cam",
        "validated",
        "drop",
    ],
)
def test_slots_and_merged_and_dropped_are_all_tokens(merger):
    """Also after many folds, in which slots with mass are dropped."""
    model = llama()
    cache = MergingDynamicCache(model=model, merger=merger, max_tokens=32, recent_tokens=6)
    for piece in prompt(400).split(50, dim=1):
        model(piece, **cache_argument(cache))
    slots = sum(layer.slots_per_head.sum() for layer in cache.layers)
    assert 32 * 4 - 2 <= slots <= 32 * 4
    for layer in cache.layers:
        slots = (layer.positions >= 0).sum(dim=-1)
        assert (layer.num_merged + layer.num_dropped + slots == 400).all()
        assert (layer.num_merged >= 0).all()
        if isinstance(merger, dict) and merger["name"] == "count":
            assert (layer.num_dropped > 0).any()
            mass = slots if layer.log_mass is None else layer.log_mass.double().exp().sum(-1)
            torch.testing.assert_close(
                (mass + layer.num_dropped).double(), torch.full((1, 2), 400.0, dtype=torch.float64)
            )


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 10])
def test_without_a_rotary_embedding_the_last_queries_are_kept(chunk):
    model, ids = tiny_model("gpt2"), prompt(90)
    source = {"name": "stratified", "count": 16}
    merger = {"name": "mass", "queries": source}
    how = {"scorer": "keydiff", "budget": "adakv", "merger": merger, "fold_at": "decode"}
    cache = MergingDynamicCache(model=model, **how, **WINDOW)
    for piece in ids.split(chunk or 90, dim=1):
        model(piece, **cache_argument(cache))
    order = cache.layers[0]._observed.remembered["merger"].queries[1][0, 0, :, 1]
    assert order[order > 0].tolist() == list(range(75, 91))
    pickled = pickle.loads(pickle.dumps(cache))  # no rotary embedding is lost with it
    with merging_attention(model):
        expected = model(prompt(1), **cache_argument(cache)).logits
        assert torch.equal(model(prompt(1), **cache_argument(pickled)).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scorer": "expected_attention", "merger": "count"},
        {"scorer": "observed_attention"},
        {"scorer": "qfilter", "budget": "adakv"},
        {"scorer": "snapkv", "merger": "refit"},
    ],
)
def test_rows_that_are_padding_for_several_chunks(options):
    model, by_itself = llama(), llama()  # which remembers what it needs
    inputs = left_padded([90, 25])
    options = {"max_tokens": 12, **WINDOW} | options
    together, alone = (MergingDynamicCache(model=one, **options) for one in (model, by_itself))
    mine = greedy(model, inputs, 3, **cache_argument(together), prefill_chunk_size=15)
    # the chunks that the row sees of its own: its first five tokens end one
    first, rest = inputs["input_ids"][1:, 65:75], inputs["input_ids"][1:, 75:]
    by_itself(first, **cache_argument(alone))
    theirs = greedy(by_itself, torch.cat([first, rest], dim=1), 3, **cache_argument(alone))
    torch.testing.assert_close(torch.stack(mine.logits)[:, 1:], torch.stack(theirs.logits), rtol=1e-3, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [64, 100])
def test_a_folded_cache_is_no_larger_than_its_slots(chunk):
    """What is observed of a prompt goes with its fold."""
    model = llama(layers=1)
    cache = MergingDynamicCache(model=model, max_tokens=48, **WINDOW)
    for piece in prompt(1500).split(chunk, dim=1):
        model(piece, **cache_argument(cache))
        if cache.layers[0].num_slots:
            queries, where, total = cache.layers[0]._observed.remembered["merger"].queries
            assert (queries.numel(), where.numel(), total.max()) == (0, 0, 0)
    slots = cache.layers[0].storage.nbytes
    assert cache.layers[0].nbytes <= 1.01 * slots


@torch.no_grad()
@pytest.mark.parametrize("merger", ["auto", "cam", {"name": "refit", "merger": "drop"}])
def test_rows_with_different_histories_keep_their_own_queries(merger):
    model = llama()
    options, by_itself = {"merger": merger, "max_tokens": 20, **WINDOW}, llama()  # which remembers what it needs
    together, alone = (MergingDynamicCache(model=one, **options) for one in (model, by_itself))
    mask = torch.zeros(2, 0, dtype=torch.long)
    for turn, lengths in enumerate([(40, 20), (20, 40), (30, 30), (9, 9)]):
        inputs = left_padded(list(lengths), seed=turn)
        mask = torch.cat([mask, inputs["attention_mask"]], dim=1)
        new = inputs["input_ids"].shape[1]
        positions = (mask.cumsum(1) - 1)[:, -new:].clamp_min(0)
        mine = model(inputs["input_ids"], attention_mask=mask, position_ids=positions, **cache_argument(together))
        theirs = by_itself(inputs["input_ids"][1:, new - lengths[1] :], **cache_argument(alone))
        torch.testing.assert_close(mine.logits[1, -1], theirs.logits[0, -1], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("how", ["pickled", "released"])
def test_a_prompt_that_waits_for_its_fold_keeps_its_module(how):
    model = llama()
    cache = MergingDynamicCache(model=model, fold_at="decode", **WINDOW)
    model(prompt(60), **cache_argument(cache))
    other = pickle.loads(pickle.dumps(cache)) if how == "pickled" else cache
    if how == "released":
        cache.release()
    with merging_attention(model), pytest.raises(ValueError, match=r"was pickled or released since, and RefitMerger"):
        model(prompt(1), **cache_argument(other))
    assert other.get_seq_length() == 60


def test_without_a_rotary_embedding_the_last_queries_are_asked():
    model = tiny_model("gpt2")
    cache = MergingDynamicCache(model=model, merger={"name": "mass", "queries": {"name": "stratified", "count": 5}})
    model(prompt(80), **cache_argument(cache))
    assert cache.layers[0].log_mass is not None
    states = some_states(9, asked=9)  # nor where nothing was observed
    assert torch.equal(StratifiedQueries(count=4).reference(states).queries, states.queries[:, :, -4:])


def test_queries_see_what_is_not_later():
    states = some_states(6, batch=1, heads=1, group=2, asked=3)
    states = replace(states, reference=ReferenceQueries(states.queries, torch.tensor([[2, 4, 9]])))
    attention = by_reference.full_attention(states)[0, 0]
    seen = [3, 5, 6, 3, 5, 6]
    assert [(row > 0).sum().item() for row in attention] == seen
    torch.testing.assert_close(attention.sum(-1), torch.ones(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": "first"}, "unknown queries 'first'"),
        ({"queries": {"name": "last", "count": 0}}, "count is 0"),
        ({"routing": "cosine"}, "routing is 'cosine'; choose one of"),
        ({"least_explained": 2}, "least_explained is 2"),
        ({"max_ratio": -1}, "max_ratio is -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MassMerger(**options)


def test_states_without_queries_are_refused():
    states = replace(some_states(12), queries=None, query_positions=None)
    with pytest.raises(ValueError, match="MassMerger weighs a fold by reference queries, but there are none"):
        MassMerger().merge(states, keep(states, 6))


def test_rows_with_too_few_queries_to_judge_drop():
    states = some_states(30, asked=4)
    positions = torch.tensor([[30, 31, 32, 33], [30, -1, -1, -1]])
    states = replace(states, reference=ReferenceQueries(states.queries, positions))
    survivors = keep(states, 9)
    slots, dropped = (one.merge(states, survivors) for one in (ValidatedMerger(margin=0.0), DropMerger()))
    assert torch.equal(slots.values[1], dropped.values[1])
    assert not torch.equal(slots.values[0], dropped.values[0])


def test_bad_options_of_wrapping_mergers():
    with pytest.raises(ValueError, match="unknown merger 'masses'"):
        RefitMerger(merger="masses")
    with pytest.raises(ValueError, match="ridge is 0"):
        RefitMerger(ridge=0)
    with pytest.raises(ValueError, match=r"mergers is \(\); give a list of mergers"):
        ValidatedMerger(mergers=())
    with pytest.raises(ValueError, match="mergers is 5; give a list"):
        ValidatedMerger(mergers=5)
    with pytest.raises(ValueError, match="mergers is {'name': 'mass'}; give a list"):
        ValidatedMerger(mergers={"name": "mass"})
    with pytest.raises(ValueError, match="held_out is 0.9"):
        ValidatedMerger(held_out=0.9)


class Asking(DropMerger):
    """Drops, and notes the queries it was shown."""

    needs_queries, query_window, shown = True, 16, None

    def merge(self, states, survivors):
        self.shown = states.queries.shape[2]
        return super().merge(states, survivors)


class Remembering(DropMerger):
    def observe(self, states, new):
        return None


@torch.no_grad()
def test_wrapping_mergers_ask_for_what_the_wrapped_need():
    model, asking = llama(), Asking()
    for merger in (RefitMerger(merger=asking), ValidatedMerger(mergers=[asking])):
        asking.shown = None
        model(prompt(60), **cache_argument(MergingDynamicCache(model=model, merger=merger, **WINDOW)))
        assert asking.shown == 16
    with pytest.raises(ValueError, match="Remembering observes the prompt, which a merger inside RefitMerger cannot"):
        RefitMerger(merger=Remembering())


@pytest.mark.parametrize(("held_out", "judges"), [(0.25, 3), (0.5, 5), (0.3, 3), (0.4, 4), (0.45, 5), (0.05, 1)])
def test_the_share_that_judges(held_out, judges):
    asked = []

    class Spy(MassMerger):
        def merge_heads(self, states, survivors):
            asked.append(states.reference.queries.shape[2])
            return super().merge_heads(states, survivors)

    states = some_states(30, asked=10)
    ValidatedMerger(queries="last", held_out=held_out, mergers=[Spy()]).merge(states, keep(states, 9))
    assert asked == [10 - judges]
