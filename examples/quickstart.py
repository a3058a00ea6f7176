"""Full cache, evicting and merging side by side, on long prompts with questions that come after them.

    python examples/quickstart.py
    python examples/quickstart.py --model Qwen/Qwen3-0.6B --words 3000

Each context is read once into a cache, which folds at its end; then every question about it is asked on a copy of that
cache. Printed are the answers, how many of them are right, the bytes the cache holds and the speed of answering.
"""

import argparse
import copy
import importlib.util
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache
from transformers.utils import logging

from merging_cache import MergingDynamicCache, MergingQuantizedCache
from merging_cache.model import cache_argument
from merging_cache.report import align, report_layers
from needle_tasks import Context, Question, make_context, score

KINDS = {"multi-key": "look-up", "copy": "copy", "frequent": "top 3"}


@dataclass
class Variant:
    """One kind of cache, and what was measured with it."""

    name: str
    make_cache: Callable[[], Cache]
    scores: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    answers: list[str] = field(default_factory=list)
    nbytes: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def means(self) -> list[float]:
        """The mean score of each kind of question."""
        return [sum(values) / len(values) for values in self.scores.values()]

    @property
    def mean(self) -> float:
        """The mean of these, all kinds alike."""
        return sum(self.means) / len(self.means)

    def row(self, full_bytes: int) -> list[str]:
        return [
            self.name,
            *(f"{mean:.2f}" for mean in self.means),
            f"{self.mean:.2f}",
            f"{self.nbytes:,}",
            f"{self.nbytes / full_bytes:.2f}",
            f"{self.tokens / self.seconds:.0f}",
        ]


def build_variants(model, scorer: str, ratios: list[float]) -> list[Variant]:
    """The full cache, then dropping and merging at each ratio, in full precision and at 4 bits."""
    variants = [Variant("full cache", lambda: DynamicCache(config=model.config))]
    storages = [("", lambda **options: MergingDynamicCache(model=model, **options))]
    if importlib.util.find_spec("optimum.quanto" if importlib.util.find_spec("optimum") else "optimum"):
        storages.append((", 4 bits", lambda **options: MergingQuantizedCache("quanto", model=model, **options)))
    else:
        print("optimum-quanto is not installed: no 4-bit rows (pip install 'merging_cache[quanto]')")
    for ratio in ratios:
        for suffix, cache_class in storages:
            for merger in ("drop", "auto"):
                options = {"scorer": scorer, "merger": merger, "compression_ratio": ratio}
                variants.append(
                    Variant(
                        f"{merger} {ratio:.0%}{suffix}",
                        lambda cache_class=cache_class, options=options: cache_class(**options),
                    )
                )
    return variants


def pick_questions(rng: random.Random, context: Context, lookups: int) -> list[Question]:
    """Some of the look-ups of a context and all its other questions."""
    by_kind = {kind: [q for q in context.questions if q.kind == kind] for kind in KINDS}
    return (
        rng.sample(by_kind["multi-key"], min(lookups, len(by_kind["multi-key"])))
        + by_kind["copy"]
        + by_kind["frequent"]
    )


@torch.no_grad()
def ask(model, tokenizer, variant: Variant, context: Context, questions: list[Question]) -> None:
    """Read the context once, then answer every question on a copy of the cache."""
    device = model.device
    context_ids = tokenizer(context.text, return_tensors="pt").input_ids.to(device)
    cache = variant.make_cache()
    model(context_ids, **cache_argument(cache), logits_to_keep=1)
    variant.nbytes += report_layers(cache.layers).total.bytes_now
    for question in questions:
        question_ids = tokenizer(" " + question.prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(
            device
        )
        answer_length = len(tokenizer(" " + question.answer, add_special_tokens=False).input_ids)
        ids = torch.cat([context_ids, question_ids], dim=1)
        own_cache = copy.deepcopy(cache)
        started = time.perf_counter()
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **cache_argument(own_cache),
            max_new_tokens=answer_length + 1,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        variant.seconds += time.perf_counter() - started
        variant.tokens += output.shape[1] - ids.shape[1]
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        variant.answers.append(answer)
        variant.scores[question.kind].append(score(question, answer))


def print_table(rows: list[list[str]]) -> None:
    head, *lines = align(rows, left=1)
    print("\n".join([head, "-" * len(head), *lines]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "needle"), help="a folder or a name on the hub")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--words", type=int, default=512, help="words of each context")
    parser.add_argument("--contexts", type=int, default=10)
    parser.add_argument("--lookups", type=int, default=4, help="codes asked for per context")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.5, 0.75], help="fractions of tokens that lose their slot"
    )
    parser.add_argument("--scorer", default="keydiff")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device).eval()
    if options.device == "cpu" and model.num_parameters() < 50_000_000:
        torch.set_num_threads(1)  # waking other threads takes longer than a small model's work

    rng = random.Random(options.seed)
    contexts = [make_context(rng, options.words, pairs=24) for _ in range(options.contexts)]
    questions = [pick_questions(rng, context, options.lookups) for context in contexts]
    variants = build_variants(model, options.scorer, options.ratios)
    for variant in variants:  # what is built or loaded on first use (quanto compiles a kernel) is not timed
        ask(model, tokenizer, Variant(variant.name, variant.make_cache), contexts[0], questions[0][:1])
    with tqdm(total=len(variants) * sum(map(len, questions)), unit="answer", desc="asking") as bar:
        # variants take turns on each context, so that a busy machine slows them all alike
        for context, asked in zip(contexts, questions, strict=True):
            for variant in variants:
                ask(model, tokenizer, variant, context, asked)
                bar.update(len(asked))

    shown = {question.kind: index for index, question in reversed(list(enumerate(questions[0])))}
    for index in shown.values():
        question = questions[0][index]
        print(f"\n{question.prompt} …")
        width = max(len(variant.name) for variant in variants)
        print(f"  {'right'.ljust(width)}  {question.answer}")
        for variant in variants:
            print(f"  {variant.name.ljust(width)}  {variant.answers[index]}")

    count = sum(map(len, questions))
    print(
        f"\n{count} questions about {len(contexts)} contexts of {options.words} words or more; scorer {options.scorer}"
    )
    head = ["cache", *KINDS.values(), "mean", "bytes", "share", "tokens/s"]
    for variant in variants:
        variant.nbytes //= len(contexts)
    print_table([head, *(variant.row(variants[0].nbytes) for variant in variants)])


if __name__ == "__main__":
    main()
