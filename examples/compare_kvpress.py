"""What kvpress, the main peer, answers of the very contexts that `merging-cache --config` asks about.

pip install --no-deps kvpress==0.5.5 && pip install cachetools datasets fire pandas peft requests
python examples/compare_kvpress.py --config examples/smollm2/defaults.json

Needs transformers below 5.24. Hooks of kvpress look for an argument that transformers no longer passes by itself, so
they are handed it. Presses that evict by masks free nothing: what is evicted is what attention no longer sees.
"""

import argparse
import copy
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from merging_cache import load_model
from merging_cache.evaluation import Evaluation, EvaluationConfig
from merging_cache.evaluation.measure import Batch, Encoded
from merging_cache.evaluation.metrics import bootstrap_interval
from merging_cache.evaluation.run import shipped_model
from merging_cache.reading import agrees, clock, loss

PRESSES: dict[str, Callable[[Any, float], Any]] = {
    "KVzip": lambda kvpress, ratio: kvpress.KVzipPress(ratio),
    "KVzip+": lambda kvpress, ratio: kvpress.KVzipPress(ratio, kvzip_plus_normalization=True),
    "AdaKV(Compactor)": lambda kvpress, ratio: kvpress.AdaKVPress(kvpress.CompactorPress(ratio)),
    "AdaKV(ExpectedAttention)": lambda kvpress, ratio: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio)),
    "ExpectedAttention": lambda kvpress, ratio: kvpress.ExpectedAttentionPress(ratio),
    "KeyDiff": lambda kvpress, ratio: kvpress.KeyDiffPress(ratio),
    "SnapKV": lambda kvpress, ratio: kvpress.SnapKVPress(ratio),
}
FULL = "full cache"
Rates = dict[str, list[tuple[float, float]]]  # by task, of each context the share of right answers and the mean loss


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, press: Any | None) -> tuple[DynamicCache, float]:
    """A cache that has read a context under a press, and the seconds that took; without one the full cache."""
    cache, started = DynamicCache(), clock(ids.device)
    if press is None:
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
        model.model(input_ids=ids, past_key_values=cache)
    else:
        with press(model):
            places = torch.arange(ids.shape[1], device=ids.device)
            model.model(input_ids=ids, past_key_values=cache, cache_position=places)
    return cache, clock(ids.device) - started


@torch.no_grad()
def predicted(model: PreTrainedModel, cache: DynamicCache, one: Encoded) -> Tensor:
    """`[n, vocabulary]`, log-probabilities at the n tokens of a right answer, where its question is asked."""
    fed = torch.tensor([[*one.asked, *one.answer][:-1]], device=model.device)
    places = len(one.read) + torch.arange(fed.shape[1], device=model.device)[None]
    output = model(fed, position_ids=places, past_key_values=copy.deepcopy(cache), logits_to_keep=len(one.answer))
    return output.logits[0].float().log_softmax(dim=-1)


def measured(
    model: PreTrainedModel, make_press: Callable[[], Any | None], batch: Batch
) -> tuple[float, list[tuple[str, float, float]]]:
    """The seconds that reading takes, and of each task of a context the share of right answers and their mean loss."""
    seconds, rated = 0.0, [[] for _ in batch.items]
    for row in batch.rows:
        cache, took = read(model, torch.tensor([row], device=model.device), make_press())
        seconds += took
        for item, rates in zip(batch.items, rated, strict=True):
            for one in item.encoded:
                if tuple(one.read) == row:
                    said = predicted(model, cache, one)
                    rates.append((agrees(said, one.answer), loss(said, one.answer)))
    means = [torch.tensor(rates, dtype=torch.double).mean(dim=0).tolist() for rates in rated]
    return seconds, [(item.task, *mean) for item, mean in zip(batch.items, means, strict=True)]


def table(rates: dict[str, Rates], seconds: dict[str, float]) -> Iterator[str]:
    """Means over contexts, and what is added to the full cache's loss with its 95% interval, in Markdown."""
    full = rates[FULL]
    yield "| cache | " + " | ".join(f"{task}: right | loss" for task in full) + " | reading |"
    yield "|---" * (2 + 2 * len(full)) + "|"
    for name, of_cache in rates.items():
        cells = [name]
        for task, of_task in of_cache.items():
            right, losses = torch.tensor(of_task, dtype=torch.double).T
            added = losses - torch.tensor(full[task], dtype=torch.double)[:, 1]
            low, high = bootstrap_interval(added)
            cells.append(f"{right.mean():.2f}")
            cells.append(f"{losses.mean():.2f}" if name == FULL else f"{added.mean():+.2f} [{low:+.2f}, {high:+.2f}]")
        yield f"| {' | '.join(cells)} | {seconds[name] / seconds[FULL]:.1f} |"


def compare(config: EvaluationConfig, presses: Sequence[str]) -> tuple[dict[str, Rates], dict[str, float]]:
    """What is measured of each cache, and the seconds that reading took; of whole contexts only, if it is stopped."""
    import kvpress

    evaluation = Evaluation(config)
    model, _ = load_model(config.model or str(shipped_model()), dtype=config.dtype)
    caches = {FULL: lambda: None}
    for ratio in config.compression_ratios:
        for name in presses:
            caches[f"{name}, {ratio:.0%} evicted"] = lambda name=name, ratio=ratio: PRESSES[name](kvpress, ratio)
    rates: dict[str, Rates] = {name: defaultdict(list) for name in caches}
    seconds = dict.fromkeys(caches, 0.0)
    with tqdm(total=len(evaluation.batches) * len(caches), unit="cache") as bar:
        try:
            for batch in evaluation.batches:
                found = {}
                for name, make_press in caches.items():
                    found[name] = measured(model, make_press, batch)
                    bar.update()
                for name, (took, of_context) in found.items():
                    seconds[name] += took
                    for task, right, lost in of_context:
                        rates[name][task].append((right, lost))
        except KeyboardInterrupt:
            if not rates[FULL]:
                raise
            bar.write("stopped: of the contexts that were done", file=sys.stderr)
    return rates, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="whose model, contexts, questions and ratios")
    parser.add_argument("--presses", nargs="+", default=list(PRESSES), choices=list(PRESSES))
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    try:
        rates = compare(EvaluationConfig.from_json_file(options.config), options.presses)
    except (ImportError, ValueError) as error:
        parser.error(f"{error}; kvpress is installed as {__doc__.splitlines()[2]!r} says")
    print("\n".join(table(*rates)))


if __name__ == "__main__":
    main()
