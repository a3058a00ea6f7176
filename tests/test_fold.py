"""A fold as a whole: protection, padding, position order, guards."""

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import reference
from merging_cache import LayerStates, MergingConfig, Scorer
from merging_cache.scorers import FunctionScorer

pytestmark = pytest.mark.core


def states_of(length, batch=2, heads=2, dim=4, padding=None):
    positions = torch.arange(length).expand(batch, heads, length)
    keys = torch.randn(batch, heads, length, dim)
    values = torch.randn(batch, heads, length, dim)
    values[..., 0] = positions  # coded with their position, so that survivors show where they came from
    return LayerStates(keys, values, positions, padding=padding, layer_idx=0)


def left_padding(pads, length):
    return torch.arange(length)[None] < torch.tensor(pads)[:, None]


@given(
    st.integers(2, 40),
    st.integers(0, 6),
    st.integers(0, 12),
    st.sampled_from(["knorm", "keydiff", "value_norm"]),
    st.data(),
)
def test_fold_equals_loops(length, sinks, recent, scorer, data):
    num_slots = data.draw(st.integers(1, length - 1))
    torch.manual_seed(length)
    states = states_of(length)
    options = {"merger": "similarity", "sink_tokens": sinks, "recent_tokens": recent}
    fold = MergingConfig(scorer=scorer, **options).build()
    slots = fold(states, num_slots)
    for row in range(2):
        for head in range(2):
            keys, values = states.keys[row, head].double().tolist(), states.values[row, head].double().tolist()
            scores = getattr(reference, scorer)(keys, values)
            ranked = sorted(scores)
            assume(
                all(b - a > 1e-5 for a, b in itertools.pairwise(ranked))
            )  # fp32 cannot tell what is nearer than that
            kept, _, merged_values, merged, dropped = reference.fold_row(keys, values, scores, num_slots, sinks, recent)
            assert slots.positions[row, head].tolist() == kept
            torch.testing.assert_close(slots.values[row, head], torch.tensor(merged_values), rtol=1e-4, atol=1e-4)
            assert (slots.num_merged[row, head], slots.num_dropped[row, head]) == (merged, dropped)


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(1, 29), st.sampled_from(["drop", "similarity"])
)
def test_padded_rows_fold_as_if_alone(pads, num_slots, merger):
    length = 30
    torch.manual_seed(sum(pads))
    states = states_of(length, batch=len(pads), padding=left_padding(pads, length))
    fold = MergingConfig(scorer="keydiff", merger=merger, sink_tokens=2, recent_tokens=3).build()
    slots = fold(states, num_slots)
    for row, pad in enumerate(pads):
        real = length - pad
        alone = LayerStates(states.keys[row : row + 1, :, pad:], states.values[row : row + 1, :, pad:], layer_idx=0)
        if real > num_slots:
            expected = fold(alone, num_slots)
            keys, values, positions = expected.keys[0], expected.values[0], expected.positions[0] + pad
            merged, dropped = expected.num_merged[0], expected.num_dropped[0]
        else:  # a short row keeps everything, behind what padding is left
            keys, values, positions = alone.keys[0], alone.values[0], alone.positions[0] + pad
            merged = dropped = torch.zeros(2, dtype=torch.long)
        used = min(real, num_slots)
        shown = slice(num_slots - used, None)
        torch.testing.assert_close(slots.keys[row][:, shown], keys)
        torch.testing.assert_close(slots.values[row][:, shown], values)
        assert torch.equal(slots.positions[row][:, shown], positions)
        assert (slots.positions[row][:, : num_slots - used] < pad).all()  # nothing but padding is left over
        assert torch.equal(slots.num_merged[row], merged)
        assert torch.equal(slots.num_dropped[row], dropped)


@given(st.lists(st.lists(st.booleans(), min_size=20, max_size=20), min_size=1, max_size=3), st.integers(1, 19))
def test_any_padding_stays_where_the_mask_hides_it(rows, num_slots):
    """With holes in the mask, the last columns of the mask must still fit the slots."""
    padding = torch.tensor(rows)
    states = states_of(20, batch=len(rows), padding=padding)
    slots = MergingConfig(scorer="knorm", sink_tokens=0, recent_tokens=0).build()(states, num_slots)
    width = slots.positions.shape[2]
    hidden = padding[:, 20 - width :]
    survivor_is_padding = padding[:, None].expand(-1, 2, -1).gather(2, slots.positions)
    assert torch.equal(survivor_is_padding, hidden[:, None].expand_as(survivor_is_padding))
    # every row has the slots it is due, and not a column is spent in vain
    due = (~padding).sum(dim=1).clamp_max(num_slots)
    assert ((~hidden).sum(dim=1) >= due).all()
    assert width == num_slots or ((~hidden[:, 1:]).sum(dim=1) < due).any()


def test_sinks_and_recent_tokens_survive_untouched():
    states = states_of(30)
    slots = MergingConfig(scorer=lambda s: -s.positions.float(), sink_tokens=3, recent_tokens=5).build()(states, 12)
    assert slots.positions[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 25, 26, 27, 28, 29]
    untouched = [0, 1, 2, 7, 8, 9, 10, 11]
    assert torch.equal(slots.values[:, :, untouched], states.values[:, :, slots.positions[0, 0][untouched]])


@pytest.mark.parametrize(("num_slots", "kept"), [(1, [0]), (3, [0, 1, 2]), (5, [0, 1, 2, 28, 29])])
def test_protection_is_clipped_to_the_slots(num_slots, kept):
    slots = MergingConfig(scorer="knorm", sink_tokens=3, recent_tokens=5).build()(states_of(30), num_slots)
    assert slots.positions[0, 0].tolist() == kept
    assert (slots.num_dropped == 30 - num_slots).all()


def test_protected_tokens_win_over_infinite_scores():
    slots = MergingConfig(
        scorer=lambda s: torch.full(s.keys.shape[:3], torch.inf), sink_tokens=2, recent_tokens=0
    ).build()(states_of(10), 4)
    assert slots.positions[0, 0].tolist() == [0, 1, 8, 9]


@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_states_are_refused_with_the_layer(which, bad):
    states = states_of(10)
    getattr(states, which)[1, 0, 3, 2] = bad
    with pytest.raises(ValueError, match=f"layer 0 has non-finite {which}"):
        MergingConfig().build()(states, 5)


def test_non_finite_padding_is_nobodys_business():
    states = states_of(10, padding=left_padding([0, 3], 10))
    states.keys[1, :, :3] = torch.nan
    slots = MergingConfig(sink_tokens=0, recent_tokens=0).build()(states, 5)
    assert slots.keys.isfinite().all()


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda s: s.keys, r"returned \(2, 2, 10, 4\) for keys"),
        (lambda s: [1.0], "scorer <lambda> returned list"),
        (lambda s: s.keys.mul_(2).sum(-1), "changed keys or values in place"),
        (lambda s: torch.full(s.keys.shape[:3], torch.nan), "returned NaN in layer 0"),
    ],
)
def test_bad_scores(scorer, message):
    with pytest.raises(ValueError, match=message):
        MergingConfig(scorer=scorer).build()(states_of(10), 5)


def test_scorer_objects_and_functions():
    class Last(Scorer):
        def score(self, states):
            return states.positions.float()

    for scorer in (Last(), lambda s: s.positions.float()):
        slots = MergingConfig(scorer=scorer, sink_tokens=0, recent_tokens=0).build()(states_of(10), 4)
        assert slots.positions[0, 0].tolist() == [6, 7, 8, 9]
    assert isinstance(MergingConfig(scorer=lambda s: s).build().scorer, FunctionScorer)


def test_records_check_their_shapes():
    with pytest.raises(ValueError, match="do not fit together"):
        LayerStates(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 4, 2))
    with pytest.raises(ValueError, match="positions are"):
        LayerStates(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), positions=torch.zeros(1, 1, 4))
    with pytest.raises(ValueError, match="padding is"):
        LayerStates(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), padding=torch.zeros(1, 4, dtype=torch.bool))
