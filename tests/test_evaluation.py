"""The evaluation: what is measured, that it can be stopped and shared, and what is written about it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache

from merging_cache import MergingDynamicCache
from merging_cache.evaluation import Evaluation, EvaluationConfig, Summary, Variant
from merging_cache.evaluation.__main__ import main, write_reports
from merging_cache.evaluation.cores import Cores
from merging_cache.evaluation.measure import Encoder, Measurer, Questioned
from merging_cache.evaluation.metrics import (
    bootstrap_interval,
    bootstrap_interval_of_tasks,
    string_match_all,
    string_match_part,
)
from merging_cache.evaluation.needle_words import NeedleWords, count_words
from merging_cache.evaluation.plots import against_bytes, by_merger
from merging_cache.evaluation.results import Results
from merging_cache.evaluation.ruler import fit
from merging_cache.evaluation.run import shipped_model
from merging_cache.evaluation.summary import Difference
from merging_cache.evaluation.tables import markdown
from merging_cache.model import cache_argument

SMALL = {
    "tasks": ["niah_multikey_1", "vt", "qa_1"],
    "context_length": 180,
    "examples": 5,
    "batch_size": 2,
    "scorers": ["keydiff"],
    "budgets": ["uniform"],  # heads that share their slots do so within a process
    "mergers": ["drop", "similarity"],
    "compression_ratios": [0.5],
}


def measured(evaluation: Evaluation) -> dict[tuple[str, int], dict]:
    """What does not depend on the clock, by cell and example."""
    return {
        (json.dumps(cell, sort_keys=True), example): without_seconds(row)
        for cell in evaluation.cells
        for example, row in evaluation.results[cell].items()
    }


def without_seconds(row: dict) -> dict:
    return {name: value for name, value in row.items() if "seconds" not in name}


@pytest.fixture(scope="module")
def small():
    evaluation = Evaluation(EvaluationConfig(**SMALL))
    evaluation.run(progress=False)
    return evaluation


# Metrics --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "all_of_them", "any_of_them"),
    [
        (" 4821 and 1037.", ["4821", "1037"], 1.0, 1.0),
        ("4821", ["4821", "1037", "1", "9"], 0.5, 1.0),  # contained counts: 1 is in 4821
        ("The Fox\tand the OWL", ["fox", "owl", "elk"], 2 / 3, 1.0),
        ("nothing", ["fox", "owl"], 0.0, 0.0),
        ("", ["fox"], 0.0, 0.0),
        ("a\x00b", ["a\nb"], 1.0, 1.0),
    ],
)
def test_metrics_by_hand(prediction, answers, all_of_them, any_of_them):
    assert string_match_all(prediction, answers) == pytest.approx(all_of_them)
    assert string_match_part(prediction, answers) == any_of_them


def test_an_interval_by_hand():
    """Of three examples each mean of a resample is one of ten, with known probabilities."""
    low, high = bootstrap_interval(torch.tensor([0.0, 0.0, 1.0]))
    # P(mean 0) = (2/3)^3 = .30, P(mean 1) = 1/27 = .037: the percentiles are 0 and 1
    assert (low, high) == (0, 1)
    for end in bootstrap_interval(torch.full((4, 50), 0.25)):
        assert end.tolist() == pytest.approx([0.25] * 4)
    normal = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(normal)
    error = 1.96 * normal.std() / 20
    assert low.item() == pytest.approx((normal.mean() - error).item(), abs=0.01)
    assert high.item() == pytest.approx((normal.mean() + error).item(), abs=0.01)


@given(st.lists(st.lists(st.floats(-1, 1), min_size=2, max_size=9), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_the_interval_of_tasks_weighs_tasks_alike(differences):
    tensors = [torch.tensor(one, dtype=torch.float64) for one in differences]
    low, high = bootstrap_interval_of_tasks(tensors)
    mean = sum(one.mean() for one in tensors) / len(tensors)
    assert low - 1e-9 <= mean <= high + 1e-9 or high - low < 1e-9 or len(tensors[0]) < 4
    assert low >= min(one.min() for one in tensors) - 1e-9
    assert high <= max(one.max() for one in tensors) + 1e-9
    if len(tensors) == 1:
        assert (low, high) == bootstrap_interval(tensors[0])


# Results --------------------------------------------------------------------------------------------------------------


def test_results_are_kept_and_gone_on_with(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    results = Results(path, {"seed": 0, "lengths": (1, 2)})
    results.add({"a": 1, "b": [2]}, 3, {"score": 0.5})
    whole = path.read_text()
    path.write_text(whole + '{"cell": {"a": 2, "b"')  # interrupted while it wrote
    again = Results(path, {"lengths": [1, 2], "seed": 0})
    assert path.read_text() == whole
    assert again[{"b": [2], "a": 1}] == {3: {"score": 0.5}}
    assert again[{"a": 2}] == {}
    with pytest.raises(ValueError, match="measured with seed=0, and this run is to be with seed=1; choose another"):
        Results(path, {"seed": 1, "lengths": [1, 2]})
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="is not a file of results"):
        Results(path, {})


# What is measured -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
def test_answers_are_those_of_the_model_alone(known):
    """Each example by itself, by plain generate calls with plain caches, against batches padded on the left."""
    options = SMALL | {"compression_ratios": [], "max_tokens": [90], "scorers": ["snapkv"]}
    evaluation = Evaluation(EvaluationConfig(**options, question_in_context=known))
    evaluation.run(progress=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(shipped_model()).eval(), evaluation.tokenizer
    for variant in evaluation.config.variants:
        for (task, length), examples in evaluation.examples.items():
            columns = evaluation.results[{"task": task, "context_length": length, "variant": variant.to_dict()}]
            for index, (example,) in enumerate(examples):
                prediction, score = columns[index]["prediction"], columns[index]["score"]
                whole = tokenizer(example.prompt, return_tensors="pt").input_ids
                read = whole[:, :-1] if known else tokenizer(example.context, return_tensors="pt").input_ids
                if variant.is_full:
                    cache = DynamicCache(config=model.config)
                else:
                    cache = MergingDynamicCache(model=model, scorer="snapkv", merger=variant.merger, max_tokens=90)
                with torch.no_grad():
                    model(read, **cache_argument(cache))
                    options = {"max_new_tokens": example.max_new_tokens, "do_sample": False, "pad_token_id": 0}
                    output = model.generate(whole, **cache_argument(cache), **options)
                answer = tokenizer.decode(output[0, whole.shape[1] :], skip_special_tokens=True)
                assert prediction.split(" .")[0] == answer.split(" .")[0]
                right = [one in prediction for one in example.answers]
                assert score == (any(right) if task == "qa_1" else sum(right) / len(right))


def test_bytes_and_counts_are_those_of_the_cache(small):
    summary = Summary(small.results, small.cells)
    full, dropped, merged = (summary.measured("vt", 180, variant) for variant in small.config.variants)
    read = len(small.tokenizer(small.examples["vt", 180][0][0].context).input_ids)
    per_token = 3 * 4 * 2 * 32 * 4  # layers, KV heads, keys and values, dimensions, bytes
    assert full["bytes"][0] == read * per_token
    slots = read // 2
    assert dropped["bytes"][0] == pytest.approx(slots * per_token + slots * 3 * 4 * 4, rel=0.01)  # and positions
    assert dropped["dropped"][0] == merged["merged"][0] + merged["dropped"][0] == read - slots
    assert full["merged"] == full["dropped"] == dropped["merged"] == [0] * 5
    assert len(full["prediction"]) == len(full["score"]) == len(full["decoding_seconds"]) == 5


def test_quantized_caches_budgets_and_sizes_are_swept(tmp_path):
    config = EvaluationConfig(
        tasks=["vt"],
        context_length=160,
        examples=2,
        scorers=["keydiff"],
        budgets=["auto", {"name": "adakv", "safeguard": 0.5}],
        mergers=["auto"],
        compression_ratios=[],
        max_tokens=[64],
        quantize=["none", "quanto-4", "fp8"],
    )
    evaluation = Evaluation(config)
    evaluation.run(progress=False)
    rows = {row.variant.label: row for row in Summary(evaluation.results, evaluation.cells).rows(["vt"], 160)}
    assert len(rows) == 1 + 2 * 2 * 3
    read = len(evaluation.encoder(evaluation.examples["vt", 160][0][0]).read)
    assert rows["keydiff drop 64 tokens"].share == pytest.approx(64 / read, rel=0.05)
    assert rows["keydiff drop 64 tokens quanto-4"].share < 0.3 * rows["keydiff drop 64 tokens"].share
    assert rows["keydiff drop 64 tokens fp8"].share < 0.4 * rows["keydiff drop 64 tokens"].share
    assert "keydiff adakv(safeguard=0.5) auto 64 tokens fp8" in rows


@pytest.mark.parametrize("known", [False, True])
def test_losses_are_those_of_the_model_alone(known):
    """Token by token, each question on a cache of its own that read the context, against one pass over padded rows."""
    options = SMALL | {"tasks": ["facts", "quotations", "following", "vt"], "compression_ratios": [], "examples": 2}
    options |= {"max_tokens": [90], "scorers": ["snapkv"], "batch_size": 20, "generate": False, "context_length": 200}
    evaluation = Evaluation(EvaluationConfig(**options, question_in_context=known))
    evaluation.run(progress=False)
    model = AutoModelForCausalLM.from_pretrained(shipped_model()).eval()

    def alone(variant, encoded):
        """The log-probabilities `[n, vocabulary]` at the tokens of the answer."""
        cache = DynamicCache(config=model.config) if variant.is_full else variant.make_cache(model)
        with torch.no_grad():
            model(torch.tensor([encoded.read]), **cache_argument(cache))
            if not variant.is_full:
                cache.activate_past_recording()  # the question folds nothing
            fed = torch.tensor([[*encoded.asked, *encoded.answer][:-1]])
            logits = [model(one, **cache_argument(cache)).logits[0, -1] for one in fed.split(1, dim=1)]
        return torch.stack(logits[-len(encoded.answer) :]).log_softmax(-1)

    for item in (item for batch in evaluation.batches for item in batch.items):
        full = [alone(Variant(), encoded) for encoded in item.encoded]
        for variant in evaluation.config.variants:
            row = evaluation.results[evaluation._cell(item, variant)][item.index]
            held = [alone(variant, encoded) for encoded in item.encoded]
            answers = [torch.tensor(encoded.answer) for encoded in item.encoded]
            losses = [-one.gather(1, answer[:, None]).mean() for one, answer in zip(held, answers, strict=True)]
            apart = [(other.exp() * (other - one)).sum(-1).mean() for one, other in zip(held, full, strict=True)]
            right = [torch.equal(one.argmax(-1), answer) for one, answer in zip(held, answers, strict=True)]
            assert row["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=2e-4)
            assert row["kl"] == pytest.approx(torch.stack(apart).mean().item(), abs=2e-4)
            assert row["score"] == sum(right) / len(right)
    contexts = {tuple(row) for batch in evaluation.batches for row in batch.rows}
    # of questions that are read all but the last token, which is the fact's name; the text goes on whatever is asked
    assert len(contexts) == 2 + 2 * (1 + 4 + 1 if known else 1)


# Stopping, going on and sharing ---------------------------------------------------------------------------------------


def command(output: Path, *more: str) -> list[str]:
    options = ["--context-length", "180", "--examples", "5", "--batch-size", "2", "--scorers", "keydiff"]
    options += ["--tasks", *SMALL["tasks"], "--budgets", "uniform"]
    options += ["--mergers", "similarity", "--compression-ratios", "0.5"]
    return ["-m", "merging_cache.evaluation", *options, "--output", str(output), *more]


def launch(launcher: str, *arguments: str) -> None:
    """Run a command of the environment in several processes of one thread each."""
    command = [str(Path(sys.executable).parent / launcher), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


def by_example(lines: list[dict]) -> dict[tuple[str, int], dict]:
    return {(json.dumps(line["cell"], sort_keys=True), line["example"]): line["measured"] for line in lines}


def read_lines(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["measured"] = without_seconds(line["measured"])
    return lines


def test_a_killed_run_goes_on_where_it_was(tmp_path, small):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *command(tmp_path)], **quiet)
    path = tmp_path / "results.jsonl"
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_text()
    before = before[: before.rfind("\n") + 1]
    finished = before.count("\n") - 1
    assert 2 <= finished < 45  # some examples, not all of them
    done = subprocess.run([sys.executable, *command(tmp_path)], check=True, capture_output=True, text=True)
    assert path.read_text().startswith(before)  # timings included: what was finished was not measured again
    lines = read_lines(tmp_path)[1:]
    assert len(lines) <= 45 + 1  # but for a cache of which one example was written and the other not
    assert by_example(lines) == measured(small)
    assert re.search(
        r"to do: \d+ contexts of up to \d+ tokens to read, in \d+ readings?, \d+ caches? to fill", done.stderr
    )
    assert {"report.html", "summary.md", "summary.json"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "launcher",
    [
        "accelerate launch --multi_gpu --num_processes 2 --main_process_port {port}",
        "torchrun --standalone --nproc-per-node 2",
    ],
)
def test_two_processes_give_what_one_gives(launcher, tmp_path, small):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launcher, *options = launcher.format(port=free.getsockname()[1]).split()
    launch(launcher, *options, *command(tmp_path))
    assert by_example(read_lines(tmp_path)[1:]) == measured(small)
    assert "2 processes" in (tmp_path / "summary.md").read_text()


def test_tensor_parallel_gives_what_one_process_gives(tmp_path):
    """Each process holds the caches of its own KV heads, which are counted together; a budget over layers sees all.

    At the end they leave their group: one whose gloo threads still run when Python exits is aborted, now and then.
    """
    _, module, *options = command(tmp_path, "--tp-plan", "auto", "--budgets", "uniform", "global", "profile")
    script = tmp_path / "run.py"
    script.write_text(
        f"from torch import distributed\nfrom {module}.__main__ import main\n"
        f"main({options!r})\nassert not distributed.is_initialized()\n"
    )
    launch("torchrun", "--standalone", "--nproc-per-node", "2", str(script))
    alone = Evaluation(EvaluationConfig(**SMALL | {"budgets": ["uniform", "global", "profile"]}))
    alone.run(progress=False)
    expected, found = measured(alone), by_example(read_lines(tmp_path)[1:])
    assert found.keys() == expected.keys()
    for key, row in found.items():
        for name, value in row.items():
            alone, near = expected[key][name], {"rel": 1e-3, "abs": 1e-4}
            if "profile" in str(key):  # each process rounds the slots of its own heads, and a slot takes several in
                near = {"rel": 0.02, "abs": 2.0 if name in ("merged", "dropped") else 0.02}
            assert value == (alone if name == "prediction" else pytest.approx(alone, **near))


def test_evaluations_on_one_machine_share_its_cores(tmp_path):
    one = Cores(8, tmp_path)
    assert one.share == 8
    two = Cores(8, tmp_path)
    three = Cores(8, tmp_path)
    assert (one.share, two.share, three.share) == (2, 2, 2)
    two.leave()
    assert (one.share, three.share) == (4, 4)
    crowd = [Cores(2, tmp_path / "small") for _ in range(5)]  # more than there are cores
    assert {cores.share for cores in crowd} == {1}
    assert Cores(folder=tmp_path / "mine").share == len(os.sched_getaffinity(0))


# Reports --------------------------------------------------------------------------------------------------------------


def test_a_summary_by_hand():
    """Three examples of two tasks; differences are taken example by example and tasks count alike."""
    variants = [
        Variant(),
        *(Variant("knorm", merger=merger, compression_ratio=0.5) for merger in ("drop", "similarity")),
    ]
    scores = {"vt": ([1, 1, 1], [0, 1, 0], [1, 1, 0]), "fwe": ([1, 0, 1], [0, 0, 0], [0, 0, 1])}
    results, cells = Results(None, {}), []
    for task, of_variants in scores.items():
        for variant, column in zip(variants, of_variants, strict=True):
            cells.append({"task": task, "context_length": 99, "variant": variant.to_dict()})
            costs = {"bytes": 100.0 if variant.is_full else 40.0, "fold_seconds": 2.0, "decoding_seconds": 3.0}
            more = {"reading_seconds": 1.5, "merged": 0.0, "dropped": 5.0, "prediction": "x", "kl": 0.1}
            for index, score in enumerate(column):
                results.add(cells[-1], index, {"score": score, "loss": 2.0 - score, **costs, **more})
    summary = Summary(results, cells)
    full, dropped, merged = summary.rows(["vt", "fwe"], 99)
    assert full.values["score"] == pytest.approx((1 + 2 / 3) / 2)
    assert (full.against_full, full.against_drop, full.share) == ({}, {}, 1)
    assert dropped.against_full["score"].mean == pytest.approx((-2 / 3 - 2 / 3) / 2)
    assert dropped.against_drop == {}
    assert merged.against_drop["score"].mean == pytest.approx((1 / 3 + 1 / 3) / 2)
    assert merged.against_drop["loss"].mean == pytest.approx(-1 / 3)
    assert merged.against_full["score"].mean == pytest.approx(-1 / 3)
    assert merged.share == 0.4
    assert merged.examples == 6
    (gain,) = [row.against_drop["score"] for row in summary.rows(["fwe"], 99) if row.against_drop]
    low, high = bootstrap_interval(torch.tensor([0.0, 0.0, 1.0]))
    assert (gain.low, gain.high) == (low, high)
    assert Difference.between([torch.tensor([1.0])], [torch.tensor([0.0])]).low == 1
    assert not Difference.between([torch.tensor([1.0])], [torch.tensor([0.0])]).is_sure  # one example tells nothing
    lines = markdown(summary).splitlines()
    assert lines[0] == "### 2 tasks of 99 tokens, 3 examples of each"
    row = next(line for line in lines if line.startswith("| knorm similarity 50% |")).split(" | ")
    assert row[1:4] == ["0.500", "1.500", "0.100"]
    assert row[4:8] == [one[name].text(3) for one in (merged.against_full, merged.against_drop) for name in one]
    assert row[8:13] == ["40", "0.40", "1.500", "2.000", "3.000"]
    assert "| knorm similarity 50% | 0.67 | 0.33 |" in lines
    assert "| knorm similarity 50% | 1.33 | 1.67 |" in lines


def test_a_large_sweep_is_summed_up():
    """Rows are left to the caches that win at their bytes; the others stand in a table by merger, and as dots."""
    sizes, mergers = (0.25, 0.5, 0.75), ("drop", "mass", "count")
    variants = [Variant()] + [
        Variant({"name": "random", "seed": seed}, merger=merger, compression_ratio=size)
        for size in sizes
        for seed in range(15)
        for merger in mergers
    ]
    results, cells, losses = Results(None, {}), [], {}
    for variant in variants:
        seed = 0 if variant.is_full else variant.scorer["seed"]
        share = 1 if variant.is_full else 1 - variant.compression_ratio
        losses[variant.label] = 1.0 if variant.is_full else 1 + variant.compression_ratio + seed / 8
        losses[variant.label] += {"mass": -0.25, "count": 5.0}.get(variant.merger, 0.0)
        costs = {"bytes": 1000 * share, "reading_seconds": 1.0, "fold_seconds": 1.0, "merged": 0.0, "dropped": 0.0}
        for task in ("facts", "following"):
            cells.append({"task": task, "context_length": 99, "variant": variant.to_dict()})
            results.add(cells[-1], 0, {"score": 0.5, "loss": losses[variant.label], "kl": 0.0, **costs})
    summary = Summary(results, cells)
    best = [row.variant.label for row in summary.best(["facts", "following"], 99)]
    # at a quarter evicted one loses as little as the full cache
    assert best == [f"random(seed=0) mass {size:.0%}" for size in sizes]
    assert all(losses[label] == 0.75 + size for label, size in zip(best, sizes, strict=True))
    lines = markdown(summary).splitlines()
    assert lines[0] == (
        "### 2 tasks of 99 tokens, 1 example of each; of 136 caches those than which none loses less with as many "
        "bytes or fewer"
    )
    assert sum(line.startswith("| random(seed=0) mass 50% |") for line in lines) == 3
    assert not any(line.startswith("| random(seed=1) mass") for line in lines)
    title = "### 75% evicted: loss added to the full cache's by merger, 99 tokens (bold: the least)"
    after = lines[lines.index(title) + 2 :]
    assert after[:4] == [
        "|  | drop | mass | count |",
        "|---|---|---|---|",
        "| random(seed=0) | +0.75 | **+0.50** | +5.75 |",
        "| random(seed=1) | +0.88 | **+0.62** | +5.88 |",
    ]
    (panel,) = against_bytes(summary, 99, "loss").axes
    dots, line = (one for one in panel.get_lines() if len(one.get_xdata()) > 1 and one.get_linestyle() != ":")
    assert len(dots.get_xdata()) == 135
    assert list(line.get_xdata()) == [0.75, 0.5, 0.25]
    assert panel.get_ylim()[1] < max(losses.values())  # what fails by far does not press the others together
    panels = by_merger(summary, 99, "loss").axes
    assert [panel.get_title() for panel in panels] == ["25% evicted", "50% evicted", "75% evicted"]
    numbers = [text for text in panels[2].texts if text.get_fontweight() == "bold"]
    assert [text.get_text() for text in numbers] == ["+0.50"]
    assert len(panels[2].texts) == 45


def test_a_stopped_sweep_compares_what_all_caches_were_measured_on():
    results, cells = Results(None, {}), []
    for variant, indices in ((Variant(), (0, 1, 2)), (Variant("knorm", merger="drop", compression_ratio=0.5), (0, 2))):
        cells.append({"task": "vt", "context_length": 99, "variant": variant.to_dict()})
        for index in indices:
            results.add(cells[-1], index, {"score": float(index), "loss": 0.0, "kl": 0.0, "bytes": 1.0})
    cells.append(cells[-1] | {"variant": Variant("knorm", merger="mass", compression_ratio=0.5).to_dict()})
    full, dropped = Summary(results, cells).rows(["vt"], 99)  # of the third nothing was measured
    assert full.values["score"] == dropped.values["score"] == 1
    assert full.examples == dropped.examples == 2


def test_reports_are_written(tmp_path, small):
    tables, named = write_reports(small, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert set(named) == files | {"results.jsonl"}
    assert files == {
        "summary.md",
        "summary.json",
        "report.html",
        "score_against_bytes_180.png",
        "score_gain_by_task_180.png",
        "loss_against_bytes_180.png",
        "loss_gain_by_task_180.png",
    }
    assert (tmp_path / "score_against_bytes_180.png").read_bytes().startswith(b"\x89PNG")
    assert tables in (tmp_path / "summary.md").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["by_task"]) == 9
    assert [row["cache"] for row in summary["over_all_tasks"]] == [variant.label for variant in small.config.variants]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4
    assert not re.search(r"""(src|href)=["']https?:""", page)  # opens offline
    for variant in small.config.variants:
        assert page.count(variant.label) >= 3
    assert small.examples["vt", 180][0][0].context in page
    figure = against_bytes(Summary(small.results, small.cells), 180, "score")
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    row = Summary(small.results, small.cells).row(SMALL["tasks"], 180, small.config.variants[2])
    assert lines["keydiff uniform similarity"].get_xdata()[0] == row.share
    assert lines["keydiff uniform similarity"].get_ydata()[0] == row.values["score"]


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--tasks niah", "tasks is 'niah'; choose one of .*niah_single_1"),
        ("--scorers snap", "unknown scorer 'snap'; choose one of"),
        ("--mergers auto none", "unknown merger 'none'"),
        ("--budgets even", "unknown budget 'even'"),
        ('--mergers {"name":"mass","share":1}', "does not take {'share': 1}"),
        ("--mergers {mass}", "is no JSON"),
        ("--compression-ratios 1.5", "compression_ratio is 1.5"),
        ("--max-tokens 0", "max_tokens is 0"),
        ("--quantize quanto-3", "quantize='quanto-3'|nbits"),
        ("--quantize int8", "int8"),
        ("--quantize quanto-four", "give 'none', or a backend and bits"),
        ("--context-length 4096", "context_length is 4096, but the shipped needle model allows at most 1024"),
        ("--context-length 1024 --tasks niah_multikey_2", "different words of the needle model are needed"),
        ("--context-length 60 --tasks cwe", "cwe takes at least 80 tokens, and the context length is 60"),
        ("--context-length 200 --depth 2", "depth is 2.0; it must be at most 1"),
        ("--examples 0", "examples is 0; it must be at least 1"),
        ("--model no/such/model", "there is no model 'no/such/model'"),
        ("--haystack README.md", "haystack is given, but the shipped needle model knows a few hundred words"),
        ("--haystack nowhere.txt", "haystack is 'nowhere.txt', and there is no such file"),
        ("--context-length 1000 --tasks facts", "with 256 tokens of facts behind it, is 1256, but .* at most 1024"),
        ("--context-length 32 --tasks facts", "prose takes at least .* tokens, and the context length is 32"),
        ("--model nowhere.gguf", "there is no file nowhere.gguf"),
        ("--data nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("--config nowhere.json", "nowhere.json could not be read as an evaluation config in JSON"),
        ("--chat", "chat is True, but .* has no chat template"),
        ("--device-map auto --tp-plan auto", "device_map and tp_plan are both given"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("work began"))
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert re.search(complaint, capsys.readouterr().err)


def test_another_setting_needs_another_output(tmp_path):
    Evaluation(EvaluationConfig(**SMALL), tmp_path).results.add({"task": "x"}, 0, {})
    more = SMALL | {"scorers": ["knorm", "keydiff"], "tasks": ["vt"]}
    Evaluation(EvaluationConfig(**more), tmp_path)  # more or fewer cells are no other setting
    with pytest.raises(ValueError, match=r"measured with seed=0, and this run is to be with seed=3"):
        Evaluation(EvaluationConfig(**SMALL | {"seed": 3}), tmp_path)


def test_a_file_that_changed_is_another_setting(tmp_path):
    (tmp_path / "data").mkdir()
    record = {
        "context": "code fox 1000 .",
        "question": " question : code fox",
        "answer": "1000",
        "task": "niah_single_1",
    }
    data = tmp_path / "data" / "one.jsonl"
    data.write_text(json.dumps(record))
    options = {"data": str(data.parent), "scorers": ["knorm"], "compression_ratios": [0.5]}
    evaluation = Evaluation(EvaluationConfig(**options), tmp_path)
    assert list(evaluation.examples) == [("niah_single_1", 4 + 4 + 128)]
    evaluation.results.add({"task": "x"}, 0, {})
    Evaluation(EvaluationConfig(**options), tmp_path)
    data.write_text(json.dumps(record | {"answer": "1037"}))
    with pytest.raises(ValueError, match="was measured with data="):
        Evaluation(EvaluationConfig(**options), tmp_path)


def test_a_setting_of_which_nothing_was_measured_gives_way(tmp_path):
    Evaluation(EvaluationConfig(**SMALL), tmp_path)
    evaluation = Evaluation(EvaluationConfig(**SMALL | {"seed": 3}), tmp_path)
    evaluation.results.add({"task": "x"}, 0, {})
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["setting"]["seed"] == 3


@pytest.mark.parametrize("place", ["file", "file/below", "results.jsonl is a folder"])
def test_an_output_that_cannot_be_is_refused(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    output = tmp_path / place.split(" is ")[0]
    if "is a folder" in place:
        (tmp_path / "results.jsonl").mkdir()
        output = tmp_path
    with pytest.raises(SystemExit):
        main(["--examples", "1", "--tasks", "vt", "--context-length", "180", "--output", str(output)])
    assert str(output) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"question_in_context": "no"}, TypeError, "question_in_context is 'no'; it must be True or False"),
        ({"chat": "no"}, TypeError, "chat is 'no'"),
        ({"examples": "3"}, TypeError, "examples is '3'; it must be an integer"),
        ({"scorers": "knorm"}, TypeError, "scorers is 'knorm'; give a list"),
        ({"scorers": []}, ValueError, "scorers is an empty list"),
        ({"scorers": [None]}, ValueError, "scorers holds null"),
        ({"tasks": []}, ValueError, "tasks is an empty list"),
        ({"mergers": None}, TypeError, "mergers is None; give a list"),
        ({"compression_ratios": 0.5}, TypeError, "compression_ratios is 0.5; give a list"),
        ({"quantize": [4]}, TypeError, "quantize is 4"),
        ({"max_tokens": [None]}, ValueError, "max_tokens holds null"),
        ({"context_length": "512"}, TypeError, "context_length is '512'; give a list"),
        ({"grids": [3]}, TypeError, "grids holds 3"),
        ({"data": ""}, ValueError, "data is empty; leave it out instead"),
        ({"haystack": "essays.txt"}, TypeError, "haystack is 'essays.txt'; give a list"),
        ({"dtype": "float17"}, ValueError, "dtype is 'float17'"),
        ({"depth": -1}, ValueError, "depth is -1; it must be at least 0"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(options, error, complaint):
    with pytest.raises(error, match=complaint):
        EvaluationConfig(**options)


def test_what_the_model_cannot_do_is_said_before_anything_is_measured(tmp_path, capsys):
    arguments = [
        "--examples",
        "2",
        "--tasks",
        "vt",
        "--context-length",
        "180",
        "--compression-ratios",
        "0.5",
        "--mergers",
        "drop",
        "--scorers",
    ]
    for scorer, complaint in (
        ('{"name": "kvzap", "weights": "/no/such/folder"}', "/no/such/folder"),
        ("keydiff --attn-implementation none", "none"),
        ('keydiff --budgets {"name":"per_layer","weights":[1,2]}', "weights"),
    ):
        named = [scorer] if scorer.startswith("{") else scorer.split()
        with pytest.raises(SystemExit):
            main([*arguments, *named, "--output", str(tmp_path)])
        assert complaint in capsys.readouterr().err
        assert (tmp_path / "results.jsonl").read_text().count("\n") == 1


def test_generation_is_greedy_whatever_the_model_says(tmp_path, small):
    """A model's own generation config may hold penalties and beams; they are none of the cache's."""
    for path in shipped_model().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "generation_config.json").read_text())
    config |= {"repetition_penalty": 50.0, "num_beams": 3, "min_new_tokens": 3, "do_sample": True, "temperature": 9.0}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    evaluation = Evaluation(EvaluationConfig(**SMALL, model=str(tmp_path)))
    evaluation.run(progress=False)
    assert measured(evaluation) == measured(small)


def test_random_scores_are_the_same_for_every_merger():
    config = EvaluationConfig(**SMALL | {"scorers": ["random"], "seed": 3})
    assert {variant.merging.scorer["seed"] for variant in config.variants[1:]} == {3}


@pytest.mark.parametrize("scorer", ["knorm", "keydiff", "snapkv"])
def test_answers_do_not_depend_on_the_batch_size(scorer, tmp_path):
    """Contexts and questions of different lengths, with as many slots for each."""
    examples = [
        fit(task, NeedleWords(), count_words, length, index=length)
        for task in ("niah_multiquery", "niah_multikey_1", "qa_2")
        for length in (110, 180, 240)
    ]
    records = [
        {"context": one.context, "question": one.question, "answer": one.answers, "task": "niah_multiquery"}
        for one in examples
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = {"scorers": [scorer], "compression_ratios": [], "max_tokens": [60], "recent_tokens": 8}
    options["budgets"] = ["adakv" if scorer == "keydiff" else "auto"]  # a profile is that of the first batch
    of_sizes = []
    for batch_size in (1, 4, 9):
        config = EvaluationConfig(**options, data=str(tmp_path / "data.jsonl"), batch_size=batch_size)
        evaluation = Evaluation(config)
        evaluation.run(progress=False)
        assert sorted(item.index for batch in evaluation.batches for item in batch.items) == list(range(9))
        assert max(len(batch.rows) for batch in evaluation.batches) == batch_size
        found = sorted(measured(evaluation).items())
        of_sizes.append([row["prediction"] for _, row in found])
    assert of_sizes[0] == of_sizes[1] == of_sizes[2]


def test_nothing_is_rehearsed_twice(monkeypatch):
    evaluation = Evaluation(EvaluationConfig(**SMALL | {"compression_ratios": [0.5, 0.75]}))
    calls = []
    measure = Questioned.measure

    def counted(self, variant):
        calls.append(variant)
        return measure(self, variant)

    monkeypatch.setattr(Questioned, "measure", counted)
    evaluation.prepare()
    assert [one.label for one in calls] == ["full cache", "keydiff uniform drop 50%", "keydiff uniform similarity 50%"]
    evaluation.prepare()
    assert len(calls) == 3


def test_every_context_is_read_once(monkeypatch):
    read = []
    reads = Measurer.read
    monkeypatch.setattr(Measurer, "read", lambda self, batch, *args: read.append(batch) or reads(self, batch, *args))
    tasks = ["facts", "quotations", "following", "vt"]
    evaluation = Evaluation(EvaluationConfig(**SMALL | {"tasks": tasks, "batch_size": 1, "context_length": 200}))
    assert len(evaluation.batches) == 5 + 5  # the tasks about prose share their contexts
    evaluation.run(progress=False)
    assert len(read) - 1 == 10  # beside the rehearsal
    assert {tuple(batch.rows) for batch in read[1:]} == {tuple(batch.rows) for batch in evaluation.batches}


def test_a_stage_is_one_however_it_is_spelled():
    config = EvaluationConfig(**SMALL | {"scorers": ["keydiff", {"name": "keydiff"}], "mergers": [{"name": "auto"}]})
    labels = ["full cache", "keydiff uniform drop 50%", "keydiff uniform auto 50%"]
    assert [variant.label for variant in config.variants] == labels


def test_the_output_is_no_part_of_the_data(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"context": "fox .", "question": " fox", "answer": "1", "task": "vt"}')
    with pytest.raises(ValueError, match="is inside the data"):
        Evaluation(EvaluationConfig(data=str(tmp_path)), tmp_path / "out")
    (tmp_path / "one.jsonl").write_text('{"context": "fox .", "question": " ", "answer": "1", "task": "vt"}')
    with pytest.raises(ValueError, match="a question of vt is ' ', no token"):
        Evaluation(EvaluationConfig(data=str(tmp_path)))


def test_each_answer_has_its_own_limit(tmp_path):
    records = [
        {"context": "code fox 1000 .", "question": " question : code fox", "answer": "1000", "task": "cwe"} | limit
        for limit in ({"max_new_tokens": 1}, {"max_new_tokens": 6})
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    evaluation = Evaluation(EvaluationConfig(data=str(tmp_path / "data.jsonl"), compression_ratios=[]))
    rows = evaluation.run(progress=False)[evaluation.cells[0]]
    assert len(rows[0]["prediction"].split()) == 1


# Options --------------------------------------------------------------------------------------------------------------


def test_the_command_line_comes_before_the_file(tmp_path, monkeypatch):
    seen = {}

    def stop(config, output):
        seen["config"] = config
        raise RuntimeError

    monkeypatch.setattr("merging_cache.evaluation.__main__.Evaluation", stop)
    (tmp_path / "options.json").write_text(json.dumps({"seed": 5, "examples": 7, "budgets": ["adakv"]}))
    with pytest.raises(RuntimeError):
        main(["--config", str(tmp_path / "options.json"), "--examples", "3", "--question-in-context"])
    expected = EvaluationConfig(seed=5, examples=3, budgets=["adakv"], question_in_context=True)
    assert seen["config"] == expected
    (tmp_path / "options.json").write_text('{"sead": 5}')
    with pytest.raises(SystemExit):
        main(["--config", str(tmp_path / "options.json")])


def test_grids_are_several_products():
    config = EvaluationConfig(
        scorers=["knorm"],
        compression_ratios=[0.25, 0.875],
        grids=[
            {"mergers": ["similarity"]},
            {"scorers": ["keydiff"], "budgets": ["adakv"], "compression_ratios": [0.5]},
        ],
        mergers=["auto"],
    )
    assert [variant.label for variant in config.variants] == [
        "full cache",
        "knorm drop 25%",
        "knorm similarity 25%",
        "knorm drop 87.5%",
        "knorm similarity 87.5%",
        "keydiff adakv drop 50%",
        "keydiff adakv auto 50%",
    ]
    with pytest.raises(ValueError, match="a grid names 'examples'"):
        EvaluationConfig(grids=[{"examples": 3}])


def test_every_option_of_the_config_has_a_flag():
    import dataclasses

    from merging_cache.evaluation.__main__ import build_parser

    flags = {action.dest for action in build_parser()._actions}
    fields = {field.name for field in dataclasses.fields(EvaluationConfig)}
    assert fields - flags == {"grids"}
    assert flags - fields == {"help", "config", "output"}


def test_chat_templates_stand_around_the_context(small, monkeypatch):
    evaluation = Evaluation(EvaluationConfig(**SMALL))
    evaluation.tokenizer.chat_template = (
        "{% for message in messages %}vote for {{ message['content'] | trim }} end {% endfor %}"
        "{% if add_generation_prompt %}passage begins{% endif %}"
    )
    encoder = Encoder(evaluation.tokenizer, chat=True)
    (example,) = evaluation.examples["vt", 180][0]
    encoded = encoder(example)
    text = evaluation.tokenizer.decode(encoded.read + encoded.asked)
    assert text == f"vote for {example.context}{example.question} end passage begins"


def test_the_grid_of_the_pull_request_is_a_config():
    path = Path(__file__).parents[1] / "examples" / "ruler_qwen3_8b.json"
    config = EvaluationConfig.from_json_file(path)
    labels = [variant.label for variant in config.variants]
    assert len(labels) == 1 + 4 * 4 * (1 + 2 + 2) + 4 * 2
    assert {f"knorm {merger} 75%" for merger in ("drop", "similarity", "auto")} < set(labels)
    assert "expected_attention adakv similarity(merge_fraction=0.75) 88%" in labels
    assert "kvzap(weights='nvidia/KVzap-mlp-Qwen3-8B') threshold(threshold=-4.0) auto" in labels
    assert all(variant.is_full or variant.merging.sink_tokens == 0 for variant in config.variants)
    assert (config.lengths, config.examples, config.seed) == ((4096,), 50, 42)


def test_a_model_spread_by_accelerate_gives_what_it_gives_in_one_piece(small):
    evaluation = Evaluation(EvaluationConfig(**SMALL, device_map="auto"))
    evaluation.run(progress=False)
    assert measured(evaluation) == measured(small)
