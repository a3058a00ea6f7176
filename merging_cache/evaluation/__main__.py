"""The command: `python -m merging_cache.evaluation`, or `merging-cache`.

Measures what a cache costs in answers: RULER's 13 tasks (arXiv:2404.06654), facts and quotations in real prose and the
text that follows, with the full cache, with tokens dropped and with tokens merged, and says so in tables, pictures and
a page. Every context is read once. Stop it when you like: started again with the same --output it goes on with what is
missing. Options are given here, or in a JSON file (--config) under the same names with underscores.

    python -m merging_cache.evaluation --output needle
    merging-cache --model smollm2 --tasks facts quotations following --examples 12 --output smollm2
    merging-cache --model Qwen/Qwen3-0.6B --tasks niah_single_1 vt cwe fwe --scorers snapkv keydiff --output qwen
    accelerate launch --num_processes 8 -m merging_cache.evaluation --config ruler_qwen3_8b.json --output qwen3-8b
    torchrun --nproc-per-node 2 -m merging_cache.evaluation --model Qwen/Qwen3-32B --tp-plan auto --output qwen3-32b
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from ..budgets import BUDGETS
from ..config import read_options
from ..mergers import MERGERS
from ..model import SHIPPED_MODELS
from ..scorers import SCORERS
from .config import EvaluationConfig
from .page import report_page
from .plan import counted
from .plots import save_plots
from .run import Evaluation
from .summary import Summary
from .tables import markdown
from .tasks import TASKS

STOPPED = 130  # the exit status of what was interrupted


def spec(text: str) -> str | dict[str, Any]:
    """A stage as the command line gives it: a name, or JSON with a name and options."""
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error


def build_parser() -> argparse.ArgumentParser:
    """The options, none of which has a default here: what is not given is taken from --config or `EvaluationConfig`."""
    parser = argparse.ArgumentParser(
        prog="merging-cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add(
        "--model",
        help=f"{', '.join(SHIPPED_MODELS)}, a folder, a GGUF file, or a name on the hub; default: the small model that "
        "ships with this project",
    )
    add("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)}; default: all that no file is missing for")
    add(
        "--context-length",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help="of prompt and answer; default: 512, 1024 for models that packages ship, 4096 for others",
    )
    add("--scorers", nargs="+", type=spec, metavar="NAME|JSON", help=f"of {', '.join(sorted(SCORERS))}")
    add(
        "--mergers", nargs="+", type=spec, metavar="NAME|JSON", help=f"of {', '.join(MERGERS)}; drop is always measured"
    )
    add("--budgets", nargs="+", type=spec, metavar="NAME|JSON", help=f"of {', '.join(BUDGETS)}; default: the scorer's")
    add(
        "--compression-ratios", nargs="*", type=float, metavar="RATIO", help="shares of the tokens that lose their slot"
    )
    add("--max-tokens", nargs="+", type=int, metavar="TOKENS", help="sizes in slots, besides or instead of ratios")
    add("--quantize", nargs="+", metavar="BACKEND-BITS", help="storages: none, quanto-4, quanto-2, hqq-4, fp8")
    add("--examples", type=int, help="of each task; default: 40")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--question-in-context", action="store_true", help="read the question before the fold, so that scorers know it"
    )
    asked.add_argument(
        "--question-after", dest="question_in_context", action="store_false", help="ask after the fold (default)"
    )
    add(
        "--generate",
        action=argparse.BooleanOptionalAction,
        help="answer RULER's tasks by generation (default), or only measure how likely right answers are",
    )
    add(
        "--batch-size",
        type=int,
        help="contexts read at a time, padded on the left; default: 1, or 10 of the shipped model",
    )
    add("--seed", type=int, help="default: 0")
    add("--sink-tokens", type=int, help="first tokens that always keep their slots; default: 4")
    add("--recent-tokens", type=int, help="last tokens that always do; default: 32")
    add("--depth", type=float, help="share of the haystack before a needle; random by default")
    add(
        "--haystack", nargs="+", metavar="FILE", help="texts to hide things in; default: half of Python's documentation"
    )
    add("--squad", help="SQuAD's dev-v2.0.json, for qa_1")
    add("--hotpotqa", help="HotpotQA's hotpot_dev_distractor_v1.json, for qa_2")
    add("--data", help="ready-made examples: a .jsonl or .parquet file, a folder of them, or a data set on the hub")
    add("--data-folder", help="the data set's folder on the hub; default: the context length")
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="prompt through the chat template; default: if there is one",
    )
    add("--dtype", help="of the weights; default: as they are stored")
    add("--attn-implementation", help="sdpa, eager, flash_attention_2 …")
    add("--device-map", help="auto: spread the weights over the GPUs there are")
    add("--tp-plan", help="auto: tensor parallel, under torchrun")
    add("--config", help="a JSON file of these options; those given here come first")
    add("--output", help="a folder for results and reports; without one they are only printed")
    return parser


def write_reports(evaluation: Evaluation, output: Path | None) -> tuple[str, list[str]]:
    """Write everything to the folder; returns the tables, and the names of the files.

    Writes `summary.md`, `summary.json`, `report.html` and, where matplotlib is installed, the pictures as PNG.
    """
    summary = Summary(evaluation.results, evaluation.cells)
    tables = markdown(summary)
    if output is None:
        return tables, []
    facts = describe_run(evaluation)
    title = f"What a cache costs in answers: {evaluation.name}"
    figures = save_plots(summary, output) if find_spec("matplotlib") else {}
    texts = {
        "summary.md": f"# {title}\n\n{facts}\n\n{tables}",
        "summary.json": json.dumps({"run": facts} | summary.to_dict(), indent=1) + "\n",
        "report.html": report_page(summary, figures, evaluation.examples, title, facts),
    }
    for name, text in texts.items():
        (output / name).write_text(text, encoding="utf-8")
    return tables, ["results.jsonl", *texts, *figures]


def describe_run(evaluation: Evaluation) -> str:
    """How, where and when, in a few sentences."""
    config, processes = evaluation.config, evaluation.state.num_processes
    device = torch.cuda.get_device_name() if evaluation.state.device.type == "cuda" else platform.machine() + " CPU"
    asked = "read before the fold" if config.question_in_context else "asked after the fold"
    depth = "" if config.depth is None else f", a needle at {config.depth:g} of the haystack"
    loaded = "" if config.dtype == "auto" else f" {config.dtype},"
    return (
        f"Questions {asked}{depth}, {counted(config.rows_at_a_time, 'context')} at a time, seed {config.seed}; "
        f"the first {config.sink_tokens} and last {config.recent_tokens} tokens always kept. Seconds, bytes and counts "
        "are means over a batch. "
        f"{'1 process' if processes == 1 else f'{processes} processes'} on {device},{loaded} "
        f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, {date.today()}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = build_parser()
    given = vars(parser.parse_args(arguments))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        options = read_options(given.pop("config"), "an evaluation config") if "config" in given else {}
        options |= given
        output = options.pop("output", None)
        if output is not None:
            output = Path(output)
            output.mkdir(parents=True, exist_ok=True)
        evaluation = Evaluation(EvaluationConfig.from_dict(options), output)
        evaluation.prepare()
    except (ValueError, TypeError, ImportError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    stopped = False
    try:
        evaluation.run()
    except KeyboardInterrupt:
        stopped = True
    if evaluation.state.is_main_process:
        tables, files = write_reports(evaluation, output)
        print(f"\n{evaluation.name}. {describe_run(evaluation)}\n\n{tables}")
        if files:
            print(f"written to {output}: {', '.join(files)}")
            if not find_spec("matplotlib"):
                print("matplotlib is not installed: no pictures (pip install 'merging_cache[plot]')", file=sys.stderr)
    if stopped:  # in the middle of something, so the processes cannot wait for one another
        if output is not None:
            print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(STOPPED)
    evaluation.leave()


if __name__ == "__main__":
    main()
