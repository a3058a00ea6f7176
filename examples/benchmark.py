"""Speed and memory as ratios of two things measured in one run, on the CPU or a GPU.

    python examples/benchmark.py
    python examples/benchmark.py --device cuda

The model is random but real: its size is in the table's first line. What is compared takes turns, token by token, so a
busy machine slows both alike, and medians are taken.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import trange
from transformers import Cache, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from merging_cache import LayerStates, MergingDynamicCache
from merging_cache.report import align

TOKENS = 4096
LAYERS, KV_HEADS, QUERY_HEADS, HEAD_DIM = 2, 8, 16, 64


@dataclass(frozen=True)
class Row:
    """One line of the table: two caches with as many slots, in what they differ, and the ratios of their figures."""

    what: str
    slots: str
    longest_head: float
    nbytes: float
    speed: float

    def cells(self) -> list[str]:
        return [self.what, self.slots, f"{self.longest_head:.2f}", f"{self.nbytes:.3f}", f"{self.speed:.2f}"]


def build_model(device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=QUERY_HEADS * HEAD_DIM,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2 * TOKENS,
    )
    return LlamaForCausalLM(config).to(device).eval()


def spread_scores(spread: float) -> Callable[[LayerStates], Tensor]:
    """Random scores, up to `spread` times higher in the last head than in the first: what makes adakv ragged."""

    def score(states: LayerStates) -> Tensor:
        generator = torch.Generator().manual_seed(states.layer_idx)
        scores = torch.rand(states.keys.shape[:3], generator=generator).to(states.keys.device)
        return scores * torch.linspace(1, spread, scores.shape[1], device=scores.device).view(1, -1, 1)

    return score


@torch.no_grad()
def decoding_seconds(model: LlamaForCausalLM, caches: list[Cache], tokens: int) -> list[float]:
    """The median seconds that a token takes with each of the caches, which take turns."""
    seconds: list[list[float]] = [[] for _ in caches]
    token = torch.ones((1, 1), dtype=torch.long, device=model.device)
    for step in trange(tokens + 3, desc="decoding", leave=False):
        for cache, taken in zip(caches, seconds, strict=True):
            synchronize(model.device)
            started = time.perf_counter()
            model(token, past_key_values=cache)
            synchronize(model.device)
            if step >= 3:  # the first ones build what is built on first use
                taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def compare(model: LlamaForCausalLM, what: str, one: dict[str, Any], other: dict[str, Any], tokens: int) -> Row:
    """A cache of some options against one of others, which has as many slots in all."""
    ids = torch.randint(1000, (1, TOKENS), device=model.device, generator=torch.Generator(model.device).manual_seed(0))
    caches = [MergingDynamicCache(model=model, **options) for options in (one, other)]
    for cache in caches:
        model(ids, past_key_values=cache, logits_to_keep=1)
    mine, theirs = (torch.stack([layer.slots_per_head for layer in cache.layers]) for cache in caches)
    assert mine.sum() == theirs.sum()
    nbytes = [cache.report().total.bytes_now for cache in caches]
    seconds = decoding_seconds(model, caches, tokens)
    for cache in caches:
        cache.release(model)
    longest = (mine.max() / mine.float().mean()).item()
    return Row(what, f"{int(mine.sum()):,}", longest, nbytes[0] / nbytes[1], seconds[1] / seconds[0])


def ragged_against_uniform(model: LlamaForCausalLM, ratio: float, spread: float, tokens: int) -> Row:
    """Heads of different lengths (adakv) against heads of one length."""
    options = {"scorer": spread_scores(spread), "merger": "drop", "compression_ratio": ratio}
    adakv = {"name": "adakv", "safeguard": 0.2}
    what = f"adakv against uniform, scores spread {spread:g} times"
    return compare(model, what, options | {"budget": adakv}, options | {"budget": "uniform"}, tokens)


def mass_against_none(model: LlamaForCausalLM, ratio: float, tokens: int) -> Row:
    """Slots that draw the attention of all they stand for against slots that draw their own."""
    options = {"scorer": spread_scores(1.0), "compression_ratio": ratio}
    what = "slots with mass (auto) against slots without (drop)"
    return compare(model, what, options | {"merger": "auto"}, options | {"merger": "drop"}, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens that are timed")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    model = build_model(options.device)
    print(
        f"{TOKENS:,} tokens, {LAYERS} layers of {KV_HEADS} KV and {QUERY_HEADS} query heads of {HEAD_DIM}, "
        f"{model.dtype}, {options.device}"
    )
    table = [["decoding", "slots", "longest / mean head", "bytes", "tokens/s"]]
    for ratio in (0.5, 0.75):
        for spread in (1.0, 2.0, 8.0):
            table.append(ragged_against_uniform(model, ratio, spread, options.tokens).cells())
        table.append(mass_against_none(model, ratio, options.tokens).cells())
    print("\n".join(align(table, left=1)))


if __name__ == "__main__":
    main()
