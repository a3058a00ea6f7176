"""What became of the tokens of one context: a picture, and a page that shows the text.

    python examples/show_merges.py --output .

Writes `merges.png` and `merges.html`. The context is one of RULER's tasks in the words of the shipped model.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from merging_cache import MERGERS, SCORERS, MergingDynamicCache, plot_merges
from merging_cache.evaluation import RULER
from merging_cache.evaluation.needle_words import NeedleWords, count_words
from merging_cache.evaluation.ruler import fit
from merging_cache.model import cache_argument


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=RULER, default="niah_multikey_1", metavar="TASK")
    parser.add_argument("--words", type=int, default=84, help="words of the context, its question and its answer")
    parser.add_argument("--scorer", default="keydiff", help=f"of {', '.join(sorted(SCORERS))}")
    parser.add_argument("--merger", choices=list(MERGERS), default="auto", metavar="NAME")
    parser.add_argument("--ratio", type=float, default=0.6)
    parser.add_argument("--output", type=Path, default=Path())
    options = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    needle = Path(__file__).parent / "needle"
    tokenizer = AutoTokenizer.from_pretrained(needle)
    model = AutoModelForCausalLM.from_pretrained(needle).eval()
    stages = {"scorer": options.scorer, "merger": options.merger, "compression_ratio": options.ratio}
    try:
        example = fit(options.task, NeedleWords(), count_words, options.words)
        cache = MergingDynamicCache(model=model, recent_tokens=6, trace=True, **stages)
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    ids = tokenizer(example.context, return_tensors="pt").input_ids
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    print(cache.report())
    words = [tokenizer.decode(token) for token in ids[0]]
    figure = plot_merges(cache, words, html=options.output / "merges.html")
    figure.savefig(options.output / "merges.png", dpi=90)


if __name__ == "__main__":
    main()
