"""Speed and memory against the targets of this project, as ratios of two things measured in one run.

    python examples/benchmark.py                        # about 7 minutes on 2 CPU cores
    python examples/benchmark.py --quick                # shorter contexts and fewer layers, under 3 minutes
    python examples/benchmark.py --only fold decoding   # some of its sections
    python examples/benchmark.py --device cuda          # on a GPU, with the lines that need one

What is compared takes turns, so a busy machine slows both alike, and medians are taken (of prefill, the better of two
passes); where both compute the same, results are compared, too. Keys and values are random, and models are random with
real configs, which changes no matrix product's time. How alike keys are decides in how few bits they can be told apart:
the fold is also measured on keys of which many are nearly equal, and what is lost by near survivors on real ones.
"""

import argparse
import copy
import operator
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm, trange
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    QuantizedCache,
    StaticCache,
)
from transformers.utils import logging

from merging_cache import LayerStates, MergingDynamicCache, MergingQuantizedCache
from merging_cache.layers import MergingLayer
from merging_cache.mergers import SimilarityMerger
from merging_cache.mergers.routing import nearest_survivors
from merging_cache.model import cache_argument
from merging_cache.report import align
from merging_cache.scorers import KeyDiffScorer
from merging_cache.states import Survivors, gather_tokens, top_tokens
from needle_tasks import make_context

NEEDLE = Path(__file__).parent / "needle"

KV_HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128  # of the layers that are folded and decoded with
VOCABULARY = 1000


# Lines of the table ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One figure: what was measured, how much came out, and what it should be (`"<= 4"`, say; empty for no target)."""

    section: str
    what: str
    figure: float
    unit: str = ""
    target: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached; `None` where there is none."""
        if not self.target:
            return None
        sign, bound = self.target.split()
        return {">=": operator.ge, "<=": operator.le}[sign](self.figure, float(bound))

    def cells(self) -> list[str]:
        verdict = {True: "met", False: "MISSED", None: ""}[self.is_met]
        digits = 0 if abs(self.figure) >= 100 else 2 if abs(self.figure) >= 1 else 3
        return [self.section, self.what, f"{self.figure:.{digits}f} {self.unit}".strip(), self.target, verdict]


@dataclass(frozen=True)
class Run:
    """What to run on: the device, how thoroughly."""

    device: str = "cpu"
    quick: bool = False

    def pick(self, full: Any, quick: Any) -> Any:
        """One of two values, by how thorough the run is."""
        return quick if self.quick else full


# Measuring ------------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds_of(run: Run, functions: list[Callable[[], Any]], rounds: int, warm_up: int = 1) -> list[float]:
    """The median seconds that each of the functions takes; they take turns."""
    seconds: list[list[float]] = [[] for _ in functions]
    for step in trange(rounds + warm_up, desc="rounds", leave=False):
        for function, taken in zip(functions, seconds, strict=True):
            synchronize(run.device)
            started = time.perf_counter()
            result = function()
            synchronize(run.device)
            if step >= warm_up:
                taken.append(time.perf_counter() - started)
            del result
    return [statistics.median(taken) for taken in seconds]


def peak_bytes(run: Run, function: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes allocated at a time while `function` runs, beyond those before, and what it returns."""
    if run.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        return torch.cuda.max_memory_allocated() - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]")
    held = most = 0
    for _, nbytes in changes:
        held += nbytes
        most = max(most, held)
    return most, result


# 1 and 2: folding and routing -----------------------------------------------------------------------------------------


def random_layer(
    run: Run, tokens: int, heads: int = KV_HEADS, words: int | None = None
) -> tuple[LayerStates, Survivors]:
    """Keys and values of one layer and survivors, half of the tokens; with `words`, keys near one of so many."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (
        torch.randn(1, heads, tokens, HEAD_DIM, generator=generator).to(run.device) for _ in ("keys", "values")
    )
    if words is not None:
        word = torch.randint(words, (tokens,), generator=generator).to(run.device)
        keys = keys[:, :, word] + 0.1 * keys
    scores = torch.rand(1, heads, tokens, generator=generator).to(run.device)
    return LayerStates(keys, values), Survivors(top_tokens(scores, tokens // 2))


def fold_untiled(states: LayerStates, survivors: Survivors) -> tuple[Tensor, Tensor]:
    """Similarity merging by its formula: the matrix of all cosines, its row maxima, a scatter of weighted values."""
    kept, evicted = survivors.indices, survivors.evicted(states.num_tokens)
    kept_keys, kept_values = gather_tokens(states.keys, kept), gather_tokens(states.values, kept)
    lost_keys, lost_values = gather_tokens(states.keys, evicted), gather_tokens(states.values, evicted)
    cosines = torch.nn.functional.normalize(lost_keys, dim=-1) @ torch.nn.functional.normalize(kept_keys, dim=-1).mT
    similarity, target = cosines.max(dim=-1)
    mine, theirs = lost_values.norm(dim=-1), kept_values.norm(dim=-1).gather(2, target)
    weight = similarity.clamp_min(0) * mine / (mine + theirs)
    sums = torch.zeros_like(kept_values).scatter_add_(
        2, target.unsqueeze(-1).expand_as(lost_values), weight.unsqueeze(-1) * lost_values
    )
    total = torch.zeros_like(kept_values[..., 0]).scatter_add_(2, target, weight)
    return kept_keys, (kept_values + sums) / (1 + total).unsqueeze(-1)


def fold_lines(run: Run) -> Iterator[Line]:
    merger = SimilarityMerger()
    tokens = 8192
    states, survivors = random_layer(run, tokens)
    theirs_bytes, theirs = peak_bytes(run, lambda: fold_untiled(states, survivors))
    mine_bytes, mine = peak_bytes(run, lambda: merger.merge(states, survivors))
    torch.testing.assert_close((mine.keys, mine.values), theirs, rtol=1e-4, atol=1e-4)
    results = sum(part.nbytes for part in theirs)
    del theirs, mine
    ours, untiled = seconds_of(
        run,
        [lambda: merger.merge(states, survivors), lambda: fold_untiled(states, survivors)],
        rounds=run.pick(15, 7),
        warm_up=2,
    )
    yield Line("fold", f"{tokens:,} tokens: times faster than the untiled formula", untiled / ours, "", ">= 4")
    share = (mine_bytes - results) / (theirs_bytes - results)
    yield Line("fold", f"{tokens:,} tokens: share of the memory the untiled formula adds", share, "", "<= 0.05")
    yield Line("fold", f"{tokens:,} tokens: seconds", ours, "s")
    alike = random_layer(run, tokens, words=200)
    ours, untiled = seconds_of(run, [lambda: merger.merge(*alike), lambda: fold_untiled(*alike)], rounds=3)
    what = f"{tokens:,} tokens, keys nearly those of 200 words: times faster than the untiled formula"
    yield Line("fold", what, untiled / ours)
    short, heads = run.pick(32768, 16384), run.pick(KV_HEADS, 2)
    layers = [random_layer(run, length, heads) for length in (short, 2 * short)]
    once, twice = seconds_of(run, [lambda one=one: merger.merge(*one) for one in layers], rounds=run.pick(3, 2))
    what = f"{2 * short:,} tokens against {short:,} ({heads} heads): times the seconds"
    yield Line("fold", what, twice / once, "", "<= 4.4")
    yield Line("fold", f"{short:,} tokens ({heads} heads): seconds", once, "s")


def routing_lines(run: Run) -> Iterator[Line]:
    exact, local = SimilarityMerger(), SimilarityMerger(routing="local")
    heads = run.pick(KV_HEADS, 2)
    layers = [random_layer(run, length, heads) for length in (65536, 131072)]
    once, twice = seconds_of(run, [lambda one=one: local.merge(*one) for one in layers], rounds=run.pick(3, 2))
    what = f'routing="local", 131,072 tokens against 65,536 ({heads} heads): times the seconds'
    yield Line("routing", what, twice / once, "", "<= 2.3")
    states, survivors = random_layer(run, 32768, heads)
    fast, slow = seconds_of(
        run, [lambda: local.merge(states, survivors), lambda: exact.merge(states, survivors)], rounds=run.pick(3, 1)
    )
    what = f'routing="local", 32,768 tokens ({heads} heads): times faster than exact routing'
    yield Line("routing", what, slow / fast)
    for name, near in (("random keys, 32,768 tokens", similarities(states, survivors, 256)), *real_similarities()):
        yield Line("routing", f"mean cosine to the survivor, {name}: local less than exact by", near[0] - near[1])


def similarities(states: LayerStates, survivors: Survivors, window: int) -> tuple[float, float]:
    """The mean cosine of evicted tokens with their survivors, by exact and by local routing (0 where there is none)."""
    routings = [
        nearest_survivors(states.keys, survivors, positions=states.positions, window=reach) for reach in (None, window)
    ]
    exact, local = (routing.similarity.masked_fill(routing.similarity.isinf(), 0.0) for routing in routings)
    return exact.mean().item(), local.mean().item()


def real_similarities() -> Iterator[tuple[str, tuple[float, float]]]:
    """The same for the keys of the model that ships with the examples, reading documents of its words."""
    tokenizer, model = AutoTokenizer.from_pretrained(NEEDLE), AutoModelForCausalLM.from_pretrained(NEEDLE).eval()
    for words in (512, 1024):
        text = make_context(random.Random(0), words, pairs=24).text
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"), **cache_argument(cache))
        both = []
        for layer in cache.layers:
            states = LayerStates(layer.keys, layer.values)
            survivors = Survivors(top_tokens(KeyDiffScorer().score(states), states.num_tokens // 2))
            both.append(similarities(states, survivors, window=words // 8))
        exact, local = (statistics.mean(part) for part in zip(*both, strict=True))
        yield f"keys of the shipped model, {words} words, window {words // 8}", (exact, local)


# 3: folding at the end of prefill -------------------------------------------------------------------------------------


def build_model(run: Run, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1 << 18,
    )
    return LlamaForCausalLM(config).to(run.device).eval()


def random_prompt(run: Run, tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0)).to(run.device)


@dataclass
class Stopwatch:
    """The seconds that the stages of folding take; what one calls of another is counted for both."""

    device: str
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, whose seconds are added up under `name`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(self.device)
            self.seconds[name] += time.perf_counter() - started
            return result

        return run

    @contextmanager
    def watching(self, cache: MergingDynamicCache) -> Iterator[None]:
        """Watch the stages of this cache and, as `"all"`, everything its layers do in a pass."""
        fold = cache.folding_layers[0]._shared.fold
        for stage, names in (
            (fold.scorer, ("observe", "score")),
            (fold.budget, ("allocate",)),
            (fold.merger, ("merge",)),
        ):
            for name in names:
                setattr(stage, name, self.timed(name, getattr(stage, name)))
        plain = {name: getattr(MergingLayer, name) for name in ("update", "attended")}
        for name, method in plain.items():
            setattr(MergingLayer, name, self.timed("all", method))
        try:
            yield
        finally:
            for name, method in plain.items():
                setattr(MergingLayer, name, method)


def prefill_lines(run: Run) -> Iterator[Line]:
    tokens, layers = 8192, run.pick(12, 2)
    model, ids = build_model(run, layers, hidden=1024, heads=16, kv_heads=4, head_dim=64), random_prompt(run, tokens)
    for scorer, target in (("keydiff", "<= 4"), ("snapkv", "<= 6")):
        options = {"scorer": scorer, "budget": "uniform", "merger": "similarity", "compression_ratio": 0.5}
        shares: dict[str, list[float]] = defaultdict(list)
        for _ in trange(2, desc=f"prefill with {scorer}", leave=False):
            cache = MergingDynamicCache(model=model, **options)
            watch = Stopwatch(run.device)
            with torch.no_grad(), watch.watching(cache):
                whole = watch.timed("pass", model)
                whole(ids, **cache_argument(cache), logits_to_keep=1)
            cache.release()
            alone = watch.seconds["pass"] - watch.seconds["all"]
            for name in ("all", "observe", "score", "allocate", "merge"):
                shares[name].append(100 * watch.seconds[name] / alone)
        added = shares.pop("all")
        best = added.index(min(added))
        what = f"{layers} layers, {tokens:,} tokens, similarity on {scorer}: added to the pass"
        yield Line("prefill", what, added[best], "%", target)
        for name in shares:
            if shares[name][best] > 0:
                yield Line("prefill", f"    of which {name}", shares[name][best], "%")


# 4 and 5: decoding ----------------------------------------------------------------------------------------------------


def filled(run: Run, cache: Cache, model: PreTrainedModel, tokens: int) -> Cache:
    """A cache that has seen so many random tokens."""
    config = model.config
    for layer in range(config.num_hidden_layers):
        generator = torch.Generator().manual_seed(layer)
        shape = (1, config.num_key_value_heads, tokens, config.head_dim)
        cache.update(*(torch.randn(shape, generator=generator).to(run.device) for _ in ("keys", "values")), layer)
    return cache


@torch.no_grad()
def decoding_seconds(run: Run, model: PreTrainedModel, caches: list[Cache], tokens: int) -> list[float]:
    """The median seconds that a token takes with each of the caches, which take turns."""
    token = torch.ones((1, 1), dtype=torch.long, device=run.device)
    return seconds_of(run, [lambda one=one: model(token, **cache_argument(one)) for one in caches], tokens, warm_up=3)


def decoding_model(run: Run) -> PreTrainedModel:
    return build_model(run, 2, hidden=1024, heads=QUERY_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)


@torch.no_grad()
def decoding_lines(run: Run) -> Iterator[Line]:
    model, seen, tokens = decoding_model(run), 16384, run.pick(48, 16)
    folded = {"config": model.config, "scorer": "keydiff", "merger": "similarity", "compression_ratio": 0.75}
    slots = seen // 4
    caches = [
        filled(run, MergingDynamicCache(**folded), model, seen),
        filled(run, DynamicCache(config=model.config), model, seen),
        filled(run, StaticCache(config=model.config, max_cache_len=slots + tokens + 3), model, slots),
        filled(run, MergingDynamicCache(**folded), model, seen).fixed(tokens + 3),
    ]
    ours, dynamic, static, fixed = decoding_seconds(run, model, caches, tokens)
    what = f"{seen:,} tokens seen, ratio 0.75: tokens/s over those of "
    yield Line("decoding", what + "DynamicCache", dynamic / ours, "", ">= 4")
    yield Line("decoding", what + "StaticCache with as many slots", static / ours, "", ">= 0.95")
    yield Line("decoding", what + "StaticCache, by .fixed()", static / fixed, "", ">= 0.95")
    for length, target in ((4096, ">= 1"), (seen, ">= 1.3")):
        caches = [
            filled(run, MergingDynamicCache(config=model.config, compression_ratio=0.0), model, length),
            filled(run, DynamicCache(config=model.config), model, length),
        ]
        ours, dynamic = decoding_seconds(run, model, caches, tokens)
        what = f"{length:,} tokens seen, ratio 0: tokens/s over those of DynamicCache"
        yield Line("decoding", what, dynamic / ours, "", target)
    cache = filled(run, MergingDynamicCache(**folded), model, seen)
    slack = [bytes_over_needed(cache)]
    for _ in trange(run.pick(512, 300), desc="growing", leave=False):
        filled(run, cache, model, 1)
        slack.append(bytes_over_needed(cache))
    yield Line("decoding", "bytes held over bytes of the slots, after prefill", slack[0], "", "<= 1.15")
    yield Line("decoding", f"the same, at most, in {len(slack) - 1} tokens after it", max(slack), "", "<= 1.15")
    yield from slot_lines(run)


def bytes_over_needed(cache: MergingDynamicCache) -> float:
    """All bytes the layers hold over those of their stored keys and values."""
    layers = cache.folding_layers
    return sum(layer.nbytes for layer in layers) / sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def spread_scores(spread: float) -> Callable[[LayerStates], Tensor]:
    """Random scores, up to `spread` times higher in the last head than in the first: what makes adakv ragged."""

    def score(states: LayerStates) -> Tensor:
        generator = torch.Generator().manual_seed(states.layer_idx)
        scores = torch.rand(states.keys.shape[:3], generator=generator).to(states.keys.device)
        return scores * torch.linspace(1, spread, scores.shape[1], device=scores.device).view(1, -1, 1)

    return score


@torch.no_grad()
def compare_slots(
    run: Run, model: PreTrainedModel, tokens: int, options: dict[str, Any], one: dict[str, Any], other: dict[str, Any]
) -> tuple[float, float]:
    """Tokens per second and bytes of a cache of some options over those of another, which has as many slots in all."""
    caches = [MergingDynamicCache(model=model, **options | own) for own in (one, other)]
    for cache in caches:
        model(random_prompt(run, tokens), **cache_argument(cache), logits_to_keep=1)
    mine, theirs = (torch.stack([layer.slots_per_head for layer in cache.layers]) for cache in caches)
    if mine.sum() != theirs.sum():
        raise RuntimeError(f"the caches compared have {mine.sum()} and {theirs.sum()} slots")
    nbytes = [cache.report().total.bytes_now for cache in caches]
    seconds = decoding_seconds(run, model, caches, run.pick(48, 12))
    for cache in caches:
        cache.release(model)
    return seconds[1] / seconds[0], nbytes[0] / nbytes[1]


def slot_lines(run: Run, tokens: int = 4096) -> Iterator[Line]:
    """Slots that need the linked attention against as many that do not; without targets."""
    model = decoding_model(run)
    for spread in (2.0, 8.0):
        options = {"scorer": spread_scores(spread), "merger": "drop", "compression_ratio": 0.75}
        adakv = {"budget": {"name": "adakv", "safeguard": 0.2}}
        speed, _ = compare_slots(run, model, tokens, options, adakv, {"budget": "uniform"})
        what = f"adakv, scores spread {spread:g} times: tokens/s over those of uniform heads"
        yield Line("decoding", what, speed)
    options = {"scorer": spread_scores(1.0), "compression_ratio": 0.75}
    speed, nbytes = compare_slots(run, model, tokens, options, {"merger": "mass"}, {"merger": "drop"})
    yield Line("decoding", "slots with mass: tokens/s over those of slots without", speed)
    yield Line("decoding", "slots with mass: bytes over those of slots without", nbytes)


@torch.no_grad()
def quantized_lines(run: Run) -> Iterator[Line]:
    model, slots, tokens = decoding_model(run), 4096, run.pick(40, 12)
    options = {"config": model.config, "scorer": "keydiff", "merger": "similarity", "compression_ratio": 0.75}
    caches = [
        filled(run, MergingQuantizedCache("quanto", **options), model, 4 * slots),
        filled(run, QuantizedCache("quanto", model.config, nbits=4), model, slots),
    ]
    ours, theirs = decoding_seconds(run, model, caches, tokens)
    what = f"int4, {slots:,} slots: tokens/s over those of transformers' QuantizedCache"
    yield Line("quantized", what, theirs / ours, "", ">= 1")
    # the same token, once in a cache of many slots and once in one of few, at the moment the residual is packed
    both = [filled(run, MergingQuantizedCache("quanto", **options), model, 4 * count) for count in (slots, slots // 4)]
    for cache in both:
        filled(run, cache, model, 100)  # of 128 that may gather
    packed = [partial(pack_residual, cache) for cache in both]
    many, few = seconds_of(run, packed, rounds=run.pick(15, 7))
    what = f"packing 100 tokens more: seconds after {slots:,} slots over those after {slots // 4:,}"
    yield Line("quantized", what, many / few, "", "<= 1.3")


def pack_residual(cache: MergingQuantizedCache) -> None:
    """What a step that fills the residual does besides an ordinary step, to a copy of the first layer's storage."""
    storage = copy.copy(cache.layers[0].storage)
    storage.segments, storage.residual_length = list(storage.segments), 1
    storage.settle()


# 6: peak memory -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def memory_lines(run: Run) -> Iterator[Line]:
    layers, tokens = 12, run.pick(8192, 4096)
    model = build_model(run, layers, hidden=256, heads=KV_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    ids = random_prompt(run, tokens)
    for ratio in (0.5, 0.75):
        cache = MergingDynamicCache(config=model.config, scorer="keydiff", merger="similarity", compression_ratio=ratio)
        without, _ = peak_bytes(run, lambda: model(ids, use_cache=False, logits_to_keep=1))
        with_cache, _ = peak_bytes(run, lambda cache=cache: model(ids, **cache_argument(cache), logits_to_keep=1))
        one = cache.layers[0].full_nbytes
        allowed = one + sum(layer.nbytes for layer in cache.layers[:-1])
        # the model alone holds keys and values of one layer while it attends to them
        due_to_cache = with_cache - without + one
        what = f"{layers} layers, {tokens:,} tokens, ratio {ratio}: its peak over one full layer, others folded"
        yield Line("memory", what, due_to_cache / allowed, "", "<= 1.1")


# 7: what takes a GPU --------------------------------------------------------------------------------------------------


@torch.no_grad()
def gpu_lines(run: Run) -> Iterator[Line]:
    if not run.device.startswith("cuda"):
        tqdm.write("gpu: no lines without --device cuda")
        return
    tokens, merger = 131072, SimilarityMerger()
    square = torch.randn(8192, 8192, device=run.device, dtype=torch.bfloat16)
    states, survivors = random_layer(run, tokens)
    states = LayerStates(states.keys.bfloat16(), states.values.bfloat16())
    query = torch.randn(1, QUERY_HEADS, tokens, HEAD_DIM, device=run.device, dtype=torch.bfloat16)

    def attend() -> Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, states.keys, states.values, is_causal=True, enable_gqa=True)

    product, routing, folding, attending = seconds_of(
        run,
        [
            lambda: square @ square,
            lambda: nearest_survivors(states.keys, survivors),
            lambda: merger.merge(states, survivors),
            attend,
        ],
        rounds=run.pick(20, 5),
        warm_up=3,
    )
    rate = 2 * (tokens // 2) ** 2 * HEAD_DIM * KV_HEADS / routing
    best = 2 * len(square) ** 3 / product
    yield Line(
        "gpu",
        f"{tokens:,} tokens, bf16: operations/s of routing over those of a matrix product",
        rate / best,
        "",
        ">= 0.6",
    )
    yield Line(
        "gpu", f"{tokens:,} tokens, bf16: fold over the layer's own attention", 100 * folding / attending, "%", "<= 4"
    )
    held = []
    for length in (tokens // 2, tokens):
        part = LayerStates(states.keys[:, :, :length].contiguous(), states.values[:, :, :length].contiguous())
        kept = Survivors(top_tokens(torch.rand(1, KV_HEADS, length, device=run.device), length // 2))
        most, slots = peak_bytes(run, lambda part=part, kept=kept: merger.merge(part, kept))
        held.append(most - slots.keys.nbytes - slots.values.nbytes)
    yield Line(
        "gpu",
        f"{tokens:,} tokens against {tokens // 2:,}: times the memory the fold adds",
        held[1] / held[0],
        "",
        "<= 2.1",
    )
    model, new = decoding_model(run), 256
    cache = MergingDynamicCache(config=model.config, scorer="keydiff", merger="similarity", compression_ratio=0.75)
    fixed = filled(run, cache, model, 16384).fixed(new + 1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, token = torch.compile(model, fullgraph=True), torch.ones((1, 1), dtype=torch.long, device=run.device)
    for _ in trange(new, desc="compiled", leave=False):
        compiled(token, **cache_argument(fixed))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield Line("gpu", f"graphs compiled for {new} decoded tokens", graphs, "", "<= 1")


# Everything -----------------------------------------------------------------------------------------------------------

SECTIONS = {
    "fold": fold_lines,
    "routing": routing_lines,
    "prefill": prefill_lines,
    "decoding": decoding_lines,
    "quantized": quantized_lines,
    "memory": memory_lines,
    "gpu": gpu_lines,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="shorter contexts, fewer layers and repetitions")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    run = Run(options.device, options.quick)
    name = torch.cuda.get_device_name() if run.device.startswith("cuda") else f"{options.threads} CPU threads"
    print(f"{name}, fp32, torch {torch.__version__}, transformers {transformers.__version__}, {date.today()}")
    lines = []
    for section in (progress := tqdm(options.only, leave=False)):
        progress.set_description(section)
        lines += SECTIONS[section](run)
    print("\n".join(align([["", "what", "figure", "target", ""], *(line.cells() for line in lines)], left=2)))
    missed = sum(line.is_met is False for line in lines)
    print(f"{sum(line.is_met is True for line in lines)} targets met, {missed} missed")


if __name__ == "__main__":
    main()
