"""Budgets: which tokens survive, against loops; how layers share; bad options."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from merging_cache import LayerStates
from merging_cache.budgets import AdaKVBudget, PerLayerBudget, PyramidBudget, ThresholdBudget, UniformBudget

pytestmark = pytest.mark.core


def states_of(scores):
    return LayerStates(scores.unsqueeze(-1), scores.unsqueeze(-1))


def survivors(budget, scores, num_slots):
    """For each row and head the ascending indices of its survivors."""
    answer = budget.allocate(scores, states_of(scores), num_slots)
    kept = answer.mask(scores.shape[2])
    if answer.valid is not None:  # the existing ones come last, ascending
        for row in range(scores.shape[0]):
            for head in range(scores.shape[1]):
                mine = answer.indices[row, head, answer.valid[row, head]]
                assert mine.tolist() == kept[row, head].nonzero().squeeze(1).tolist()
    return [[head.nonzero().squeeze(1).tolist() for head in row] for row in kept]


@given(st.integers(1, 20), st.integers(1, 4), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.data())
def test_adakv_equals_loops(length, heads, safeguard, data):
    num_slots = data.draw(st.integers(1, length))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=heads * length, max_size=heads * length))
    scores = torch.tensor(values).float().view(1, heads, length)
    kept = [set(reference.top_tokens(head.tolist(), max(1, int(safeguard * num_slots)))) for head in scores[0]]
    left = [(scores[0, h, i].item(), i, h) for h in range(heads) for i in range(length) if i not in kept[h]]
    left.sort(reverse=True)
    for _, token, head in left[: heads * num_slots - sum(map(len, kept))]:
        kept[head].add(token)
    assert survivors(AdaKVBudget(safeguard), scores, num_slots) == [[sorted(head) for head in kept]]


@given(st.integers(1, 20), st.integers(0, 25), st.integers(-3, 3), st.data())
def test_threshold_equals_loops(length, window, threshold, data):
    values = data.draw(st.lists(st.integers(-3, 3), min_size=2 * length, max_size=2 * length))
    scores = torch.tensor(values).float().view(1, 2, length)
    expected = []
    for head in scores[0].tolist():
        best = reference.top_tokens(head, 1)
        expected.append([i for i in range(length) if head[i] >= threshold or i >= length - window or i in best])
    assert survivors(ThresholdBudget(threshold, window), scores, 1) == [expected]


def test_safeguard_of_one_is_uniform():
    scores = torch.randn(2, 3, 20)
    assert survivors(AdaKVBudget(1.0), scores, 7) == survivors(UniformBudget(), scores, 7)


@pytest.mark.parametrize("count", [1, 2, 3, 12])
@pytest.mark.parametrize(("seen", "slots"), [(1000, 500), (1000, 100), (1000, 900), (40, 3)])
def test_layers_share_what_uniform_would_keep(count, seen, slots):
    for budget in (PyramidBudget(), PyramidBudget(beta=1), PerLayerBudget(curve=[3, 1]), PerLayerBudget(curve=[1.0])):
        shares = [budget.layer_slots(slots, seen, (index, count)) for index in range(count)]
        assert all(1 <= share <= seen for share in shares)
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= count * max(slots, 1)
        if max(shares) < seen:  # nothing was clipped, so only rounding is lost
            assert sum(shares) > count * (slots - 1)


def test_pyramid_and_curve_by_hand():
    assert [PyramidBudget(20).layer_slots(100, 1000, (i, 3)) for i in range(3)] == [195, 100, 5]
    assert [PyramidBudget(20).layer_slots(100, 150, (i, 3)) for i in range(3)] == [150, 100, 50]
    assert [PerLayerBudget(weights=[1, 2, 3]).layer_slots(30, 100, (i, 3)) for i in range(3)] == [15, 30, 45]
    assert [PerLayerBudget(curve=[1, 3, 1]).layer_slots(90, 1000, (i, 5)) for i in range(5)] == [50, 100, 150, 100, 50]


def test_nothing_folds_while_everything_fits():
    for budget in (UniformBudget(), PyramidBudget(), AdaKVBudget(), PerLayerBudget(curve=[1, 9])):
        assert not budget.may_fold(50, 50)
        assert budget.may_fold(51, 50)
    assert UniformBudget().folds(51, 51, 50)
    assert not UniformBudget().folds(50, 51, 50)
    assert not ThresholdBudget(window=20).may_fold(20, 10)
    assert ThresholdBudget(window=20).may_fold(21, 100)


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        (AdaKVBudget, {"safeguard": 1.5}, "safeguard is 1.5"),
        (ThresholdBudget, {"window": -1}, "window is -1"),
        (PyramidBudget, {"beta": 0.5}, "beta is 0.5"),
        (PerLayerBudget, {}, "give one of them"),
        (PerLayerBudget, {"weights": [1], "curve": [1]}, "give one of them"),
        (PerLayerBudget, {"weights": [1, 0]}, "positive"),
        (PerLayerBudget, {"curve": []}, "one at least"),
    ],
)
def test_bad_options(budget, options, message):
    with pytest.raises(ValueError, match=message):
        budget(**options)


def test_weights_must_fit_the_layers():
    with pytest.raises(ValueError, match="has 2 weights, but the model has 3 layers that fold"):
        PerLayerBudget(weights=[1, 2]).layer_slots(5, 10, (0, 3))
    with pytest.raises(ValueError, match="how many layers fold"):
        PyramidBudget().layer_slots(5, 10, None)
