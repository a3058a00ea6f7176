"""Accuracy of the needle model with the full cache, per kind of question: the figures of its model card.

python examples/evaluate_needle.py --words 512 --count 200
"""

import argparse
import random
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging

from merging_cache import load_model
from needle_tasks import held_out, score

KINDS = ("single", "multi-key", "copy", "frequent")


@torch.no_grad()
def accuracy(model, tokenizer, kind: str, words: int, count: int, seed: int) -> tuple[float, float]:
    """Mean score, and the fraction of answers that are right in full, over `count` held-out contexts."""
    rng = random.Random(f"{seed} {kind}")
    scores = []
    for _ in tqdm(range(count), desc=kind, leave=False):
        context, question = held_out(rng, kind, words)
        inputs = tokenizer(f"{context} {question.prompt}", return_tensors="pt").to(model.device)
        output = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=16, do_sample=False
        )
        answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        scores.append(score(question, answer))
    return sum(scores) / count, sum(value == 1 for value in scores) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "needle"))
    parser.add_argument("--words", type=int, nargs="+", default=[512])
    parser.add_argument("--count", type=int, default=200, help="contexts per kind of question")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.model)
    print("words  question    score  all right")
    for words in options.words:
        for kind in KINDS:
            mean, exact = accuracy(model, tokenizer, kind, words, options.count, options.seed)
            print(f"{words:5}  {kind:10}  {mean:.3f}      {exact:.3f}")


if __name__ == "__main__":
    main()
