"""MergingConfig: defaults, round trips, and what it says to bad input."""

import json

import pytest
import torch

from merging_cache import MergingConfig, MergingDynamicCache, Scorer
from merging_cache.budgets import AdaKVBudget, ProfileBudget, PyramidBudget, UniformBudget
from merging_cache.config import resolve_config
from merging_cache.mergers import CountMerger, DropMerger, MassMerger, RefitMerger, SimilarityMerger, ValidatedMerger
from merging_cache.mergers.queries import StratifiedQueries
from merging_cache.scorers import KeyDiffScorer, KnormScorer, LagKVScorer, ProbeScorer

pytestmark = pytest.mark.core


def test_defaults():
    config = MergingConfig()
    assert config.to_dict() == {
        "scorer": "auto",
        "compression_ratio": 0.5,
        "max_tokens": None,
        "budget": "auto",
        "merger": "auto",
        "sink_tokens": 4,
        "recent_tokens": 32,
        "fold_at": "prefill",
        "calibration": None,
    }
    assert config.build(linked=True).budget == ProfileBudget()
    assert config.build(linked=True, rereadable=False).budget == AdaKVBudget()
    assert config.build().budget == UniformBudget()
    assert config.build(linked=True).merger == RefitMerger()
    assert config.build(linked=True).scorer == ProbeScorer()
    assert config.build(linked=True, rereadable=False).scorer == config.build().scorer == KeyDiffScorer()
    assert config.build().merger == DropMerger()


@pytest.mark.parametrize(
    ("seen", "ratio", "slots"), [(64, 0.5, 32), (65, 0.5, 32), (1, 0.5, 1), (10, 0.75, 2), (7, 0, 7), (3, 0.9, 1)]
)
def test_slots_by_ratio(seen, ratio, slots):
    assert MergingConfig(compression_ratio=ratio).num_slots(seen) == slots


@pytest.mark.parametrize(("seen", "slots"), [(64, 16), (16, 16), (9, 9)])
def test_slots_by_max_tokens(seen, slots):
    config = MergingConfig(max_tokens=16)
    assert config.compression_ratio is None
    assert config.num_slots(seen) == slots


CONFIGS = [
    MergingConfig(),
    MergingConfig(max_tokens=7, fold_at="decode"),
    MergingConfig(scorer={"name": "lagkv", "lag_size": 16}, merger={"name": "similarity", "merge_fraction": 0.75}),
    MergingConfig(scorer=LagKVScorer(lag_size=16), merger=SimilarityMerger(merge_keys=True), compression_ratio=0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_round_trips(config, tmp_path):
    path = tmp_path / "merging.json"
    config.to_json_file(path)
    for other in (MergingConfig.from_dict(config.to_dict()), MergingConfig.from_json_file(path)):
        assert other.build() == config.build()
        assert other.to_dict() == config.to_dict()
    assert json.loads(path.read_text()) == config.to_dict()


def test_own_objects_stay_objects_and_do_not_fit_json(tmp_path):
    class Mine(Scorer):
        def score(self, states):
            return states.keys.sum(-1)

    config = MergingConfig(scorer=Mine())
    assert config.to_dict()["scorer"] is config.scorer
    with pytest.raises(ValueError, match="scorer is .*Mine.* which JSON cannot hold"):
        config.to_json_file(tmp_path / "merging.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": "knrom"}, "unknown scorer 'knrom'; choose one of .*'knorm'"),
        ({"scorer": {"lag_size": 3}}, "unknown scorer None"),
        ({"merger": {"name": ["similarity"]}}, r"unknown merger \['similarity'\]; choose one of"),
        (
            {"scorer": {"name": "lagkv", "lag": 3}},
            r"scorer 'lagkv' does not take {'lag': 3}; its options are \['n_sink'",
        ),
        ({"budget": "adaptive"}, "unknown budget 'adaptive'; choose one of"),
        ({"merger": "mean"}, "unknown merger 'mean'; choose one of"),
        ({"compression_ratio": 1.0}, "compression_ratio is 1.0"),
        ({"compression_ratio": -0.1}, "compression_ratio is -0.1"),
        ({"compression_ratio": float("nan")}, "compression_ratio is nan"),
        ({"compression_ratio": 0.5, "max_tokens": 4}, "compression_ratio=0.5 and max_tokens=4 are both given"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"sink_tokens": -1}, "sink_tokens is -1"),
        ({"recent_tokens": -1}, "recent_tokens is -1"),
        ({"fold_at": "never"}, "fold_at is 'never'; choose one of"),
        ({"compression": 0.5}, "unknown option 'compression'; the options are"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        MergingConfig.from_dict(options)
    with pytest.raises(ValueError, match=message):
        MergingDynamicCache(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": 3}, "scorer is 3; give a name"),
        ({"scorer": KnormScorer}, "scorer is <class .*give a name, a dict with a name and options, or a Scorer object"),
        ({"merger": SimilarityMerger}, "merger is <class"),
        ({"max_tokens": 4.5}, "max_tokens is 4.5; it must be an integer"),
        ({"compression_ratio": "0.5"}, "compression_ratio is '0.5'; it must be a number"),
        ({"sink_tokens": True}, "sink_tokens is True"),
        ({"scorer": {"name": "lagkv", "lag_size": 1.5}}, "lag_size is 1.5; it must be an integer"),
        ({"scorer": {"name": "random", "seed": "a"}}, "seed is 'a'; it must be an integer"),
        (
            {"merger": {"name": "similarity", "value_norm_weighting": "no"}},
            "value_norm_weighting is 'no'",
        ),
        ({"merger": {"name": "similarity", "merge_fraction": "half"}}, "merge_fraction is 'half'"),
        ({"budget": {"name": "per_layer", "weights": 3}}, "the weights of layers are 3"),
    ],
)
def test_bad_types(options, message):
    with pytest.raises(TypeError, match=message):
        MergingConfig(**options)


def test_cache_takes_config_dict_file_and_options(tmp_path):
    config = MergingConfig(scorer="knorm", max_tokens=9)
    path = tmp_path / "merging.json"
    config.to_json_file(path)
    for merging in (config, config.to_dict(), path, str(path)):
        assert MergingDynamicCache(merging=merging).merging == config
    assert MergingDynamicCache(scorer="knorm", max_tokens=9).merging == config
    # options go on top, and a ratio replaces a number of tokens
    mixed = MergingDynamicCache(merging=config, compression_ratio=0.25, sink_tokens=1).merging
    assert (mixed.scorer, mixed.compression_ratio, mixed.max_tokens, mixed.sink_tokens) == ("knorm", 0.25, None, 1)
    assert MergingDynamicCache(merging=MergingConfig(), max_tokens=3).merging.compression_ratio is None
    with pytest.raises(TypeError, match="merging is 3"):
        MergingDynamicCache(merging=3)
    with pytest.raises(TypeError, match="config is Linear; give the model's config"):
        MergingDynamicCache(torch.nn.Linear(1, 1))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a JSON list"):
        MergingConfig.from_json_file(tmp_path / "list.json")


def test_numbers_of_numpy_are_numbers(tmp_path):
    numpy = pytest.importorskip("numpy")
    config = MergingConfig(max_tokens=numpy.int64(9), sink_tokens=numpy.int32(1))
    assert config == MergingConfig(max_tokens=9, sink_tokens=1)
    config.to_json_file(tmp_path / "merging.json")
    assert MergingConfig(compression_ratio=numpy.float32(0.25)) == MergingConfig(compression_ratio=0.25)


def test_none_on_top_leaves_what_was_there():
    assert MergingDynamicCache(merging={"max_tokens": 30}, compression_ratio=None).merging.num_slots(1000) == 30


def test_a_config_does_not_follow_the_dict_it_came_from():
    spec = {"name": "lagkv", "lag_size": 8}
    config = MergingConfig(scorer=spec)
    spec["lag_size"] = 0
    assert config.build().scorer.lag_size == 8


def test_a_learned_scorer_is_shared_by_copies_of_a_cache():
    import copy

    class Learned(torch.nn.Module):
        def forward(self, states):
            return states.keys.sum(-1)

    cache = MergingDynamicCache(scorer=Learned(), sink_tokens=0, recent_tokens=0)
    cache.update(torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4), 0)
    twin = copy.deepcopy(cache)
    assert twin.layers[0]._shared.fold is cache.layers[0]._shared.fold


def test_files_that_hold_no_config(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    for path in (tmp_path / "bad.json", tmp_path / "missing.json", tmp_path):
        with pytest.raises(ValueError, match=f"{path} could not be read as a merging config in JSON"):
            MergingConfig.from_json_file(path)


def test_objects_inside_dicts_do_not_go_to_json(tmp_path):
    config = MergingConfig(scorer={"name": "chunk_kv", "scorer": lambda states: states.keys.norm(dim=-1)})
    with pytest.raises(ValueError, match="the config holds what JSON cannot: .* give stages as names and dicts"):
        config.to_json_file(tmp_path / "merging.json")
    assert not (tmp_path / "merging.json").exists()


def test_a_budget_goes_with_the_scorer_it_came_with():
    def budget(merging, linked=True, **options):
        return resolve_config(merging, options).build(linked).budget

    assert budget(MergingConfig(scorer="keydiff"), scorer="pyramidkv") == PyramidBudget()
    assert budget(MergingConfig(scorer="pyramidkv"), scorer="keydiff") == ProfileBudget()
    assert budget({"scorer": "pyramidkv"}, scorer="snapkv") == UniformBudget()
    assert budget({"scorer": {"name": "chunk_kv", "scorer": "keydiff"}}) == ProfileBudget()
    assert budget({"scorer": "keydiff"}, linked=False) == UniformBudget()
    assert budget(MergingConfig(scorer="pyramidkv", budget="uniform"), scorer="keydiff") == UniformBudget()
    with pytest.raises(TypeError, match="budget"):
        MergingConfig(budget=None)


@pytest.mark.parametrize(
    "budget", [{"name": "threshold", "threshold": float("nan")}, {"name": "per_layer", "weights": [1, float("inf")]}]
)
def test_numbers_that_are_none(budget):
    with pytest.raises(ValueError, match=r"it must be a number|positive, finite numbers"):
        MergingConfig(budget=budget)


def test_nested_stages_survive_json(tmp_path):
    merger = ValidatedMerger(mergers=[CountMerger(), RefitMerger(merger=CountMerger(routing="distance"))])
    config = MergingConfig(merger=merger)
    config.to_json_file(tmp_path / "config.json")
    count, refit = MergingConfig.from_json_file(tmp_path / "config.json").build().merger.candidates
    assert (count, refit.inner) == (CountMerger(), CountMerger(routing="distance"))
    config = MergingConfig(merger=MassMerger(queries=StratifiedQueries(9)))
    config.to_json_file(tmp_path / "config.json")
    assert MergingConfig.from_json_file(tmp_path / "config.json").build().merger.source.count == 9
