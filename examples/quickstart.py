"""Full cache, dropping and merging side by side: pages of real prose with facts hidden in them, and questions.

    python examples/quickstart.py
    python examples/quickstart.py --model Qwen/Qwen3-0.6B --tokens 4000
    python examples/quickstart.py --model needle

Each page is read once, by SmolLM2-135M-Instruct unless another model is named, and every cache is filled from that and
folds; then every question about it is asked on a copy of that cache. Dropping and merging hold the same bytes: what a
merger keeps besides slots, dropping gets as slots. Printed are the answers, how many of them are right, how sure the
model is of the right ones, the bytes the cache holds and the speed of answering.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import Cache, DynamicCache
from transformers.utils import logging

from merging_cache import MergingDynamicCache, MergingQuantizedCache, Reading, load_model
from merging_cache.evaluation.config import parse_quantize
from merging_cache.evaluation.english import English
from merging_cache.evaluation.measure import Encoded, Encoder
from merging_cache.evaluation.needle_words import NeedleWords
from merging_cache.evaluation.plan import counted
from merging_cache.evaluation.run import shipped_model
from merging_cache.evaluation.tasks import TASKS
from merging_cache.reading import Continuation, answer, loss, predict, release
from merging_cache.report import align, report_layers


@dataclass
class Variant:
    """One kind of cache, and what was measured with it."""

    name: str
    make_cache: Callable[[], Cache]
    answers: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    nbytes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def row(self, full_bytes: int) -> list[str]:
        """Its line of the table."""
        return [
            self.name,
            f"{sum(self.right)} of {len(self.right)}",
            f"{sum(self.losses) / len(self.losses):.2f}",
            f"{self.nbytes:,}",
            f"{self.nbytes / full_bytes:.2f}",
            f"{self.tokens / self.seconds:.0f}",
        ]


def build_variants(model, page: list[int], options: argparse.Namespace) -> list[Variant]:
    """The full cache, then dropping and merging at each ratio, at the same bytes for a page of tokens."""
    tokens = len(page)

    def cache_for(**sizes) -> Callable[[], Cache]:
        merging = {"scorer": options.scorer, "budget": options.budget} | sizes
        if options.quantize is None:
            return lambda: MergingDynamicCache(model=model, merging=merging)
        backend, nbits = parse_quantize(options.quantize)
        return lambda: MergingQuantizedCache(backend, nbits=nbits, model=model, merging=merging)

    variants = [Variant("full cache", lambda: DynamicCache(config=model.config))]
    for ratio in options.ratios:
        slots = int(tokens * (1 - ratio))
        merging = Variant(f"{options.merger}, {ratio:.0%} evicted", cache_for(merger=options.merger, max_tokens=slots))
        more = same_bytes(model, page, cache_for, merging, slots)
        variants += [
            Variant(f"drop, {1 - more / tokens:.0%} evicted", cache_for(merger="drop", max_tokens=more)),
            merging,
        ]
    return variants


def same_bytes(model, page: list[int], cache_for: Callable, merging: Variant, slots: int) -> int:
    """How many slots dropping may have for the bytes of a merging cache with `slots`."""
    reading = Reading(model, torch.tensor([page], device=model.device), progress=False)

    def nbytes(make: Callable[[], Cache]) -> int:
        cache = reading.fill(make())
        release(cache)
        return report_layers(cache.layers).total.bytes_now

    at_slots = nbytes(cache_for(merger="drop", max_tokens=slots))
    return min(len(page), round(slots * nbytes(merging.make_cache) / at_slots))


def is_right(answer: str, right: str) -> bool:
    """Whether an answer holds the right word."""
    return right.lower() in answer.lower()


@torch.no_grad()
def ask(model, encoder: Encoder, variant: Variant, reading: Reading, questions: list, encoded: list[Encoded]) -> None:
    """Fill a cache from what was read, then answer every question on a copy of it."""
    cache = reading.fill(variant.make_cache())
    variant.nbytes += report_layers(cache.layers).total.bytes_now
    read = torch.tensor([encoded[0].read], device=model.device)
    wanted = [Continuation(one.asked, one.answer) for one in encoded]
    variant.losses += [
        loss(*pair) for pair in zip(predict(model, cache, wanted), (one.answer for one in encoded), strict=True)
    ]
    for question, one in zip(questions, encoded, strict=True):
        ids = torch.cat([read, torch.tensor([one.asked], device=model.device)], dim=1)
        own = copy.deepcopy(cache)
        started = time.perf_counter()
        output = answer(model, own, ids, max_new_tokens=question.max_new_tokens)
        variant.seconds += time.perf_counter() - started
        variant.tokens += output.shape[1]
        release(own)
        said = encoder.tokenizer.decode(output[0], skip_special_tokens=True)
        variant.answers.append(" ".join(said.split()))
        variant.right.append(is_right(said, question.answers[0]))
    release(cache)


def print_table(rows: list[list[str]], left: int = 1) -> None:
    head, *lines = align(rows, left=left)
    print("\n".join([head, "-" * len(head), *lines]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2", help="smollm2, gemma3-270m, needle, a folder or a name on the hub"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="of each page; default: 1024, or 512 for needle")
    parser.add_argument("--pages", type=int, default=2, choices=range(1, 17), metavar="1-16")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.75, 0.9], help="shares of tokens that lose their slot"
    )
    parser.add_argument("--scorer", default="auto")
    parser.add_argument("--budget", default="auto")
    parser.add_argument("--merger", default="auto")
    parser.add_argument("--quantize", help="a storage, such as quanto-4 or fp8")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, tokenizer = load_model(shipped_model() if options.model == "needle" else options.model)
        run(model.to(options.device), tokenizer, options)
    except (ImportError, ValueError, TypeError) as error:
        parser.error(str(error))


def run(model, tokenizer, options: argparse.Namespace) -> None:
    """Ask, and print what was answered."""
    is_needle = NeedleWords.are(tokenizer.get_vocab())
    if options.device == "cpu" and model.num_parameters() < 50_000_000:
        torch.set_num_threads(1)  # waking other threads takes longer than a small model's work
    encoder = Encoder(tokenizer, chat=bool(tokenizer.chat_template))
    length = options.tokens or (512 if is_needle else 1024)
    wording = NeedleWords() if is_needle else English()
    pages = [
        TASKS["facts"].examples("facts", wording, encoder.length, length, options.seed, index)
        for index in range(options.pages)
    ]
    encoded = [[encoder(question) for question in page] for page in pages]
    variants = build_variants(model, encoded[0][0].read, options)
    with tqdm(total=len(variants) * sum(map(len, pages)), unit="answer", desc="asking") as bar:
        # variants take turns on each page, so that a busy machine slows them all alike
        for page, tokens in zip(pages, encoded, strict=True):
            reading = Reading(model, torch.tensor([tokens[0].read], device=model.device), progress=False)
            for variant in variants:
                ask(model, encoder, variant, reading, page, tokens)
                bar.update(len(page))

    shown = f"One of {counted(len(pages), 'page')} of {len(encoded[0][0].read)} tokens"
    print(f"\n{shown}:\n\n{pages[0][0].context[:600]} …\n")
    print("Asked about it, after the fold:")
    width = max(len(variant.name) for variant in variants)
    for index, question in enumerate(pages[0]):
        print(f"\n{question.question.strip()}\n  {'right'.ljust(width)}  {question.answers[0]}")
        for variant in variants:
            mark = "✓" if variant.right[index] else "✗"
            print(f"  {variant.name.ljust(width)}  {mark} {question.answer_prefix.strip()} {variant.answers[index]}")
    count = sum(map(len, pages))
    asked = f"{count} questions about {counted(len(pages), 'page')}"
    print(f"\n{asked}; scorer {options.scorer}, budget {options.budget}\n")
    for variant in variants:
        variant.nbytes //= len(pages)
    head = ["cache", "right", "loss of right answers", "bytes", "share", "tokens/s"]
    print_table([head, *(variant.row(variants[0].nbytes) for variant in variants)])


if __name__ == "__main__":
    main()
