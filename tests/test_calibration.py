"""Calibration: what is learned against what a second reading says, and what is written against what caches load."""

import itertools
import json
import random
import sys

import pytest
import torch

from merging_cache import MergingConfig, MergingDynamicCache, calibrate
from merging_cache.budgets import ProfileBudget
from merging_cache.budgets.profile import STEPS, table_of
from merging_cache.calibration import __main__ as command
from merging_cache.calibration.excerpts import HELD_OUT, excerpts_of
from merging_cache.calibration.gates import RIDGES, Lesson, fit_linear, fit_mlp
from merging_cache.calibration.teacher import LEAST, read_twice, taught
from merging_cache.evaluation.haystack import fitting_text, reference_prose
from merging_cache.model import cache_argument
from merging_cache.scorers import KVzapScorer, LeaveOneOutScorer
from merging_cache.scorers.kvzap import gate as run
from models import greedy, tiny_config, tiny_model
from needle_tasks import make_context

pytestmark = pytest.mark.core
SIZES = {"lengths": (48, 96), "tokens_of_length": 192, "progress": False}


@pytest.fixture(scope="module")
def text():
    rng = random.Random(3)
    return " ".join(make_context(rng, 200, pairs=4).text for _ in range(6))


@pytest.fixture(scope="module")
def calibrated(needle, text, tmp_path_factory):
    return calibrate(*needle, tmp_path_factory.mktemp("calibration") / "needle", text, **SIZES)


def tensors_in(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# What is read ---------------------------------------------------------------------------------------------------------


def test_excerpts_have_their_lengths_and_nothing_is_held_out_and_fitted(needle, text):
    tokenizer = needle[1]
    words = tokenizer(text, add_special_tokens=False).input_ids
    excerpts = excerpts_of(text, tokenizer, (48, 96), 192, seed=1)
    lengths = sorted((one.input_ids.shape[1], one.is_held_out) for one in excerpts)
    assert lengths == sorted([(48, False)] * 4 + [(96, False)] * 2 + [(48, True), (96, True)])
    cut = int(len(words) * (1 - HELD_OUT))
    parts = {False: words[:cut], True: words[cut:]}
    for one in excerpts:
        inside = one.input_ids[0, 1:-1].tolist()  # what a frame may add is at its ends
        where = parts[one.is_held_out]
        assert any(where[start : start + len(inside)] == inside for start in range(len(where)))


def test_half_of_the_excerpts_are_in_the_chat_template(needle, text):
    import copy

    tokenizer = copy.deepcopy(needle[1])
    tokenizer.chat_template = "the code of {{ messages[0]['content'] }} is"
    excerpts = excerpts_of(text, tokenizer, (48, 96), 192, seed=1)
    before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in ("the code of ", " is"))
    framed = [one.input_ids[0].tolist() for one in excerpts]
    framed = [ids[: len(before)] == before and ids[-len(after) :] == after for ids in framed]
    assert framed[1::2] == [True] * 4
    assert not all(framed)
    assert {one.input_ids.shape[1] for one in excerpts} == {48, 96}


def test_what_is_fitted_on_is_not_measured_on():
    measured = set(reference_prose())
    assert not measured & {" ".join(block.split()) for block in fitting_text().split("\n\n")}
    assert len(fitting_text()) > 50_000


@torch.no_grad()
def test_the_lesson_is_what_leaving_out_changes(needle, tmp_path, monkeypatch):
    """The scores of a second reading, and the attention's input."""
    model, tokenizer = needle
    ids = tokenizer(make_context(random.Random(0), 60, pairs=4).text, return_tensors="pt").input_ids[:, :60]
    read_twice(model, ids, 20, 5, tmp_path / "one.safetensors")
    shown, inputs, score = [], [], LeaveOneOutScorer.score
    monkeypatch.setattr(LeaveOneOutScorer, "score", lambda *args: shown.append(score(*args)) or shown[-1])
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(kwargs["hidden_states"][0]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    cache = MergingDynamicCache(model=model, scorer="leave_one_out", budget="uniform", merger="drop")
    model(ids, **cache_argument(cache))
    cache.release()
    for hook in hooks:
        hook.remove()
    chosen = torch.randperm(60, generator=torch.Generator().manual_seed(5))[:20].sort().values
    for layer, scores in enumerate(shown):
        (told,) = taught([tmp_path / "one.safetensors"], f"scores.{layer}")
        torch.testing.assert_close(told, scores[0, :, chosen].mT.clamp_min(LEAST).log())
        (told,) = taught([tmp_path / "one.safetensors"], f"inputs.{layer}")
        torch.testing.assert_close(told.float(), inputs[layer][chosen], rtol=1e-3, atol=1e-3)
    (table,) = taught([tmp_path / "one.safetensors"], "table")
    torch.testing.assert_close(table.double(), table_of(torch.cat([one[0] for one in shown])), rtol=0, atol=1e-6)


# What is fitted -------------------------------------------------------------------------------------------------------


def lesson_of(function, tokens=600, width=6):
    inputs = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)) * torch.arange(1, width + 1) + 2
    scores = function(inputs)
    half = tokens // 2
    return Lesson(inputs[:half], scores[:half], inputs[half:], scores[half:])


def test_linear_gates_are_the_ridge_solution():
    lesson = lesson_of(lambda inputs: torch.stack([inputs[:, 0] - inputs[:, 1], inputs.sin().sum(1)], dim=1))
    gate = fit_linear(lesson)
    errors = []
    mean, deviation = lesson.inputs.mean(dim=0), lesson.inputs.std(dim=0)
    for ridge in RIDGES:
        inputs = ((lesson.inputs - mean) / deviation).double()
        padded = torch.cat([inputs, (ridge * len(inputs)) ** 0.5 * torch.eye(6)])
        wanted = torch.cat([(lesson.scores - lesson.scores.mean(dim=0)).double(), torch.zeros(6, 2)])
        weight = torch.linalg.lstsq(padded, wanted).solution
        said = ((lesson.held_out_inputs - mean) / deviation).double() @ weight + lesson.scores.mean(dim=0)
        errors.append(((said - lesson.held_out_scores).square().mean().item(), said))
    error, said = min(errors, key=lambda one: one[0])
    assert gate.error == pytest.approx(error, rel=1e-3)
    torch.testing.assert_close(run(lesson.held_out_inputs, gate.weights).double(), said, rtol=1e-3, atol=1e-3)
    by_head = [torch.corrcoef(torch.stack([said[:, head], lesson.held_out_scores[:, head]]))[0, 1] for head in (0, 1)]
    torch.testing.assert_close(gate.correlation.double(), torch.stack(by_head).double(), rtol=1e-3, atol=1e-3)


def test_mlps_learn_what_no_linear_map_can():
    lesson = lesson_of(lambda inputs: (inputs[:, :1] - 2).abs() * torch.tensor([[1.0, -3.0]]) + 5, tokens=4000)
    linear, mlp = fit_linear(lesson), fit_mlp(lesson, 16, seed=0)
    assert mlp.error < linear.error / 5
    said = run(lesson.held_out_inputs, mlp.weights)
    assert mlp.error == pytest.approx((said - lesson.held_out_scores).square().mean().item())


# What is written ------------------------------------------------------------------------------------------------------


def test_the_folder_is_in_kvzaps_format(needle, calibrated):
    """One module for each layer, of the shapes that the config names."""
    config = json.loads((calibrated.folder / "config.json").read_text())
    model = needle[0].config
    assert config["model_type"] == "kvzap"
    assert (config["input_dim"], config["n_modules"]) == (model.hidden_size, model.num_hidden_layers)
    assert config["output_dim"] == model.num_key_value_heads
    sizes = [config["input_dim"], config["output_dim"]]
    modules = [torch.nn.Linear(*sizes) for _ in range(config["n_modules"])]
    if config["hidden_dim"] is not None:
        sizes.insert(1, config["hidden_dim"])
        pairs = [itertools.pairwise(sizes) for _ in modules]
        pairs = [[torch.nn.Linear(*pair) for pair in of_layer] for of_layer in pairs]
        modules = [torch.nn.Sequential(one, torch.nn.GELU(), other) for one, other in pairs]
    layers = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(modules)})
    layers.load_state_dict(tensors_in(calibrated.folder))
    scorer, inputs = KVzapScorer(weights=calibrated.folder), torch.randn(1, 7, config["input_dim"])
    for layer, module in enumerate(layers["layers"]):
        weights = scorer._weights.under(scorer.prefix(layer), like=inputs)
        torch.testing.assert_close(scorer.predict(inputs, weights), module(inputs).mT)


def test_the_better_kind_is_kept(calibrated):
    means = {kind: sum(errors) for kind, errors in calibrated.errors.items()}
    assert set(means) == {"linear", "mlp"}
    assert calibrated.kind == min(means, key=means.get)
    assert ("layers.0.weight" in tensors_in(calibrated.folder)) == (calibrated.kind == "linear")
    card = (calibrated.folder / "README.md").read_text()
    assert card.count("\n| ") == 1 + len(calibrated.layers)
    facts = json.loads((calibrated.folder / "calibration.json").read_text())
    assert (facts["kind"], facts["model"], facts["tokens"]) == (calibrated.kind, "needle", calibrated.tokens)
    assert not (calibrated.folder / "unfinished").exists()
    assert str(calibrated).count("\n") == 1 + len(calibrated.layers)


def test_a_run_that_was_stopped_goes_on(needle, text, calibrated, tmp_path, monkeypatch):
    module = sys.modules["merging_cache.calibration.calibrate"]
    read, calls = module.read_twice, []

    def stops(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args)
        read(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_twice", stops)
        with pytest.raises(KeyboardInterrupt):
            calibrate(*needle, tmp_path, text, **SIZES)
    again = []
    monkeypatch.setattr(module, "read_twice", lambda *args: again.append(args) or read(*args))
    calibrate(*needle, tmp_path, text, **SIZES)
    assert len(calls) == 3
    assert len(again) == 8 - 3
    for name, tensor in tensors_in(calibrated.folder).items():
        assert torch.equal(tensors_in(tmp_path)[name], tensor)
    assert (tmp_path / "profile.json").read_text() == (calibrated.folder / "profile.json").read_text()


def test_what_another_model_has_read_is_not_taken(needle, text, calibrated, tmp_path, monkeypatch):
    """Nor is anything else in the folder touched."""
    import copy

    other = copy.deepcopy(needle[0])
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)
    module, read = sys.modules["merging_cache.calibration.calibrate"], []
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit_linear", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            calibrate(other, needle[1], tmp_path, text, **SIZES)
    left = sorted((tmp_path / "unfinished").iterdir())
    read_twice = module.read_twice
    monkeypatch.setattr(module, "read_twice", lambda *args: read.append(args) or read_twice(*args))
    calibrate(*needle, tmp_path, text, **SIZES)
    assert len(read) == len(left) == 8
    assert sorted((tmp_path / "unfinished").iterdir()) == left
    assert all(torch.equal(one, tensors_in(calibrated.folder)[name]) for name, one in tensors_in(tmp_path).items())


def test_an_input_that_never_varies_is_left_out():
    """It would have weights that no half precision holds."""
    lesson = lesson_of(lambda inputs: inputs[:, :2] * 3)
    inputs, held_out = (one.clone() for one in (lesson.inputs, lesson.held_out_inputs))
    inputs[:, 4], held_out[:, 4] = 0.5, 0.5
    lesson = Lesson(inputs, lesson.scores, held_out, lesson.held_out_scores)
    for gate in (fit_linear(lesson), fit_mlp(lesson, 8, seed=0)):
        first = gate.weights.get("weight", gate.weights.get("0.weight"))
        assert not first[:, 4].any()
        assert all(one.half().isfinite().all() for one in gate.weights.values())
        assert all(torch.equal(one, one.half().float()) for one in gate.weights.values())


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] * 2 }}", "{{ messages[0]['content'][0] }}", "{{ 1 / 0 }}"]
)
def test_templates_that_cannot_frame_a_text_are_left_out(template, needle, text):
    import copy

    tokenizer = copy.deepcopy(needle[1])
    tokenizer.chat_template = template
    assert not any(one.is_in_chat for one in excerpts_of(text, tokenizer, (48,), 96, seed=1))


# What caches make of it -----------------------------------------------------------------------------------------------


def test_calibration_is_short_for_gates_and_profile(needle, calibrated):
    model, tokenizer = needle
    ids = tokenizer(make_context(random.Random(1), 90, pairs=4).text, return_tensors="pt").input_ids
    folder = str(calibrated.folder)
    spelled = {"scorer": {"name": "kvzap", "weights": folder}, "budget": {"name": "profile", "weights": folder}}
    caches = [
        MergingDynamicCache(model=model, compression_ratio=0.75, **options)
        for options in ({"calibration": calibrated.folder}, spelled)
    ]
    outputs = [greedy(model, ids, **cache_argument(cache)) for cache in caches]
    assert torch.equal(*(output.sequences for output in outputs))
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.positions, other.positions)
    assert not caches[0]._shared.is_to_be_read_again
    caches[0].release()
    caches[1].release()
    config = MergingConfig(calibration=folder, budget="uniform", compression_ratio=0.75)
    assert config.build(linked=True).budget == MergingConfig(budget="uniform").build(linked=True).budget
    assert isinstance(config.build(linked=True).scorer, KVzapScorer)
    assert MergingConfig.from_dict(config.to_dict()) == config


def test_heads_keep_what_the_profile_says(needle, calibrated):
    model, tokenizer = needle
    ids = tokenizer(make_context(random.Random(2), 150, pairs=4).text, return_tensors="pt").input_ids[:, :128]
    held = []
    budget = {"name": "profile", "weights": calibrated.folder}
    options = {
        "scorer": "keydiff",
        "budget": budget,
        "merger": "drop",
        "sink_tokens": 0,
        "recent_tokens": 0,
        "compression_ratio": 0.75,
    }
    cache = MergingDynamicCache(model=model, **options)
    hooks = [
        layer.register_forward_hook(lambda *_: held.append([one.num_stored for one in cache.layers]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    for hook in hooks:
        hook.remove()
    assert held[1][0] == cache.layers[0].num_stored < 128  # folded as it was read
    saved = json.loads((calibrated.folder / "profile.json").read_text())
    assert saved["kept"] == [step / STEPS for step in range(STEPS + 1)]
    for layer, of_layer in enumerate(cache.layers):
        shares = torch.tensor([head[25] for head in saved["layers"][str(layer)]])
        counts = of_layer.slots_per_head[0]
        assert ((counts - shares * 128).abs() <= 1).all()
    total = sum(int(one.slots_per_head.sum()) for one in cache.layers)
    heads = len(cache.layers) * cache.layers[0].shape.heads
    assert 32 * heads - len(cache.layers) <= total <= 32 * heads
    cache.release()


def test_a_folder_of_another_model_is_refused(needle, calibrated, tmp_path):
    import shutil

    model = needle[0]
    other = tmp_path / "other"
    shutil.copytree(calibrated.folder, other)
    facts = json.loads((other / "calibration.json").read_text())
    (other / "calibration.json").write_text(json.dumps(facts | {"model": "someone-else"}))
    for options in ({"calibration": other}, {"budget": {"name": "profile", "weights": other}}):
        with pytest.raises(ValueError, match="calibrated for someone-else, but this model is needle"):
            MergingDynamicCache(model=model, **options)
    for changed in ({"hidden_size": 3}, {"layers": [0]}):
        (other / "calibration.json").write_text(json.dumps(facts | changed))
        with pytest.raises(ValueError, match="was calibrated for a needle of width"):
            MergingDynamicCache(model=model, calibration=other)
    (other / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match="could not be read as that of a calibration"):
        MergingDynamicCache(model=model, calibration=other)
    (other / "calibration.json").write_text(json.dumps(facts))
    profile = json.loads((other / "profile.json").read_text())
    fewer = {layer: heads[:1] for layer, heads in profile["layers"].items()}
    (other / "profile.json").write_text(json.dumps(profile | {"layers": fewer}))
    with pytest.raises(ValueError, match="is a profile of 1 KV heads to a layer, but this model has"):
        MergingDynamicCache(model=model, calibration=other)
    profile["layers"].popitem()
    (other / "profile.json").write_text(json.dumps(profile))
    with pytest.raises(ValueError, match="is a profile of layers .* is it another model's"):
        MergingDynamicCache(model=model, calibration=other)
    (other / "profile.json").write_text("[]")
    with pytest.raises(ValueError, match="could not be read as a profile"):
        MergingDynamicCache(model=model, budget=ProfileBudget(weights=other))
    with pytest.raises(ValueError, match="which is no folder of a calibration"):
        MergingConfig(calibration=tmp_path / "missing")
    assert not str(model.config._attn_implementation).startswith("merging_")


def test_what_cannot_be_calibrated_is_refused(needle, text, tmp_path):
    model, tokenizer = needle
    with pytest.raises(ValueError, match="too short for excerpts of 96 tokens"):
        calibrate(model, tokenizer, tmp_path, " ".join(text.split()[:60]), **SIZES)
    longest = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"has positions for {longest}"):
        calibrate(model, tokenizer, tmp_path, text, lengths=(longest,))
    with pytest.raises(ValueError, match="at least 16"):
        calibrate(model, tokenizer, tmp_path, text, lengths=(2,))
    with pytest.raises(ValueError, match="lengths is empty"):
        calibrate(model, tokenizer, tmp_path, text, lengths=())
    for wrong, said in (
        ({"lengths": 48}, "give a list"),
        ({"text": ["a"]}, "give one string"),
        ({"seed": "a"}, "seed is 'a'"),
    ):
        with pytest.raises(TypeError, match=said):
            calibrate(model, tokenizer, tmp_path, **{"text": text} | wrong)
    with pytest.raises(TypeError, match="give the model's tokenizer"):
        calibrate(model, None, tmp_path, text)
    with pytest.raises(TypeError, match="give a transformers model"):
        calibrate("needle", tokenizer, tmp_path, text)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds the config of something else"):
        calibrate(model, tokenizer, tmp_path, text)
    with pytest.raises(ValueError, match="is a file; give a folder"):
        calibrate(model, tokenizer, tmp_path / "config.json", text)
    (tmp_path / "config.json").unlink()
    config = tiny_config("mistral")  # all of whose layers have windows
    config.vocab_size = len(tokenizer)
    sliding = type(tiny_model("mistral"))(config)
    with pytest.warns(UserWarning, match="nothing will be folded"), pytest.raises(ValueError, match="nothing to calib"):
        calibrate(sliding, tokenizer, tmp_path, text, lengths=(48,), progress=False)


def test_the_command(text, tmp_path, capsys):
    from conftest import NEEDLE

    (tmp_path / "text.txt").write_text(text)
    sizes = ["--lengths", "48", "--tokens", "96", "--text", str(tmp_path / "text.txt")]
    assert command.main(["--model", str(NEEDLE), "--output", str(tmp_path / "out"), *sizes]) == 0
    shown = capsys.readouterr().out
    assert "layer  linear  mlp  r" in shown
    assert (tmp_path / "out" / "profile.json").is_file()
    assert command.main(["--model", str(NEEDLE), "--output", str(tmp_path), "--text", str(tmp_path / "none.txt")]) == 2
    assert "none.txt could not be read as a text" in capsys.readouterr().err
