"""Every scorer with every merger at several ratios, as a table of the needle model's accuracy.

    python examples/compare_scorers.py
    python examples/compare_scorers.py --scorers snapkv keydiff --budget adakv --ratios 0.9

Each context is read once into a cache, which folds at its end, before anything is asked. Printed is the mean accuracy
over look-ups, copying and counting; `--output` saves the accuracy of each as JSON. kvzap and fast_kvzip have no
published weights for this model, so theirs are trained first (see train_surrogates.py).
"""

import argparse
import itertools
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from merging_cache import BUDGETS, MERGERS, SCORERS, MergingDynamicCache
from needle_tasks import make_context
from quickstart import Variant, ask, pick_questions
from train_surrogates import train_surrogates

LEARNED = ("kvzap", "fast_kvzip")
MERGER_ORDER = ("drop", "similarity")


def build_variants(model, scorers: dict[str, dict], mergers: list[str], ratios: list[float], budget: str | None):
    """The full cache, then every scorer with every merger at every ratio, by `(scorer, ratio, merger)`."""

    def variant(scorer: str, ratio: float, merger: str) -> Variant:
        options = {"scorer": scorers[scorer], "compression_ratio": ratio, "merger": merger}
        if budget is not None:
            options["budget"] = budget
        return Variant(f"{scorer} {merger} {ratio:.0%}", lambda: MergingDynamicCache(model=model, **options))

    cells = itertools.product(scorers, ratios, mergers)
    return {None: Variant("full cache", lambda: DynamicCache(config=model.config))} | {
        cell: variant(*cell) for cell in cells
    }


def markdown(variants: dict, scorers: list[str], mergers: list[str], ratios: list[float]) -> Iterator[str]:
    """A row for each scorer, the best first, and a pair of columns for each ratio."""
    columns = list(itertools.product(ratios, mergers))
    rows = {name: [variants[name, *column].mean for column in columns] for name in scorers}
    yield "| scorer | " + " | ".join(f"{merger} {ratio:.0%}" for ratio, merger in columns) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    for name, means in sorted(rows.items(), key=lambda row: -sum(row[1])):
        yield f"| `{name}` | " + " | ".join(f"{mean:.2f}" for mean in means) + " |"
    mean_of_all = [sum(column) / len(column) for column in zip(*rows.values(), strict=True)]
    yield "| mean | " + " | ".join(f"{mean:.2f}" for mean in mean_of_all) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorers", nargs="+", choices=sorted(SCORERS), default=sorted(SCORERS), metavar="NAME")
    parser.add_argument("--mergers", nargs="+", choices=sorted(MERGERS), default=list(MERGER_ORDER), metavar="NAME")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--budget", choices=sorted(BUDGETS), help="by default the scorer's own, mostly uniform")
    parser.add_argument("--contexts", type=int, default=40)
    parser.add_argument("--lookups", type=int, default=4, help="codes asked for per context")
    parser.add_argument("--words", type=int, default=512, help="words of each context")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for the accuracies of every kind of question")
    options = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    needle = Path(__file__).parent / "needle"
    tokenizer = AutoTokenizer.from_pretrained(needle)
    model = AutoModelForCausalLM.from_pretrained(needle).eval()

    rng = random.Random(options.seed)
    contexts = [make_context(rng, options.words, pairs=24) for _ in range(options.contexts)]
    questions = [pick_questions(rng, context, options.lookups) for context in contexts]
    scorers = {name: {"name": name} for name in options.scorers}
    if "random" in scorers:
        scorers["random"]["seed"] = options.seed
    with tempfile.TemporaryDirectory() as folder:
        if learned := [name for name in LEARNED if name in scorers]:
            folders = train_surrogates(model, tokenizer, Path(folder), words=options.words, seed=options.seed)
            for name in learned:
                scorers[name]["weights"] = str(folders[name])
        variants = build_variants(model, scorers, options.mergers, options.ratios, options.budget)
        with tqdm(total=len(variants) * len(contexts), unit="context", desc="asking") as bar:
            for variant in variants.values():
                for context, asked in zip(contexts, questions, strict=True):
                    ask(model, tokenizer, variant, context, asked)
                    bar.update()

    count = sum(map(len, questions))
    print(f"\n{count} questions about {len(contexts)} contexts of {options.words} words or more; ", end="")
    print(f"budget {options.budget or 'of the scorer'}; full cache {variants[None].mean:.2f}\n")
    print("\n".join(markdown(variants, options.scorers, options.mergers, options.ratios)))
    if options.output is not None:
        result = {variant.name: variant.scores for variant in variants.values()}
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
