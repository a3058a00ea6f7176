"""Every merger against dropping, on the needle model and on synthetic tokens: accuracy, divergence and output error.

    python examples/compare_mergers.py --output mergers.jsonl --plot mergers.png
    python examples/compare_mergers.py --mergers drop count '{"name": "count", "similarity_threshold": 0.8}'

Each context is read once into a cache, which folds at its end, before anything is asked. For every scorer and ratio all
mergers are asked the same about the same contexts, so differences are taken context by context; intervals are 95%
bootstrap intervals of the mean difference. Measured are

- accuracy: of looking up, copying and counting, as generated, the three kinds alike (`generate` reads the question in
  one pass, after which the cache folds again: the question's own tokens come under the ratio, too);
- KL: the divergence of the next word from the full cache's, over the words of the right answers, in nats;
- error: of the attention layers' outputs for these words, squared, as a share of the full cache's outputs squared.

The synthetic tokens go through a one-layer model in which tokens attend to tokens like themselves: clustered, many
times repeated, or unlike each other, without positions, and clustered with rotary ones. Only the error is measured.

`--output` keeps what was measured, cell by cell, and goes on from there when it is run again. It knows mergers by their
names and options only: begin a new file when the code has changed.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.utils import logging

from merging_cache import MERGERS, SCORERS, MergingConfig, MergingDynamicCache
from merging_cache.evaluation.metrics import bootstrap_interval
from merging_cache.evaluation.plots import heat_map
from merging_cache.evaluation.results import Results
from merging_cache.model import cache_argument
from merging_cache.report import new_figure
from needle_tasks import KINDS, Context, Question, make_context, pick_questions, score

NEEDLE = Path(__file__).parent / "needle"
WHOLE = 0  # a cell is measured in one go: its columns are all that is kept of it
GATED = '{"name": "count", "similarity_threshold": 0.7}'
BY_KEYS = '{"name": "residual", "clusters": "keys"}'
REFITTED = '{"name": "refit", "merger": "auto"}'
SYNTHETIC = ("clustered", "repeated", "isotropic", "rotary")
LATER = 16  # synthetic tokens that come after the context
BATCH = 25
Measured = dict[str, list[float]]  # by metric, a number for each context


@dataclass(frozen=True)
class Setting:
    """What is held fixed while scorers, ratios and mergers change."""

    contexts: int
    words: int
    sink_tokens: int
    recent_tokens: int
    seed: int


@dataclass(frozen=True)
class Asked:
    """Questions of one kind about a batch of B contexts, n about each: `ids` `[B * n, q]` and the right `answers`."""

    ids: Tensor
    answer_ids: Tensor
    questions: list[Question]


# The needle model -----------------------------------------------------------------------------------------------------


@cache
def needle() -> tuple[PreTrainedModel, AutoTokenizer]:
    return AutoModelForCausalLM.from_pretrained(NEEDLE).eval(), AutoTokenizer.from_pretrained(NEEDLE)


def make_contexts(setting: Setting) -> list[Context]:
    """Contexts of exactly as many words as asked for, so that they can be read in batches without padding.

    Raises:
        ValueError: if the facts alone take more words.
    """
    rng = random.Random(setting.seed)
    contexts: list[Context] = []
    for _ in range(100 * setting.contexts):  # one in six or seven fits
        context = make_context(rng, setting.words, pairs=24 if setting.words > 300 else 12)
        if len(context.text.split()) == setting.words:
            contexts.append(context)
        if len(contexts) == setting.contexts:
            return contexts
    raise ValueError(f"no {setting.contexts} contexts of exactly {setting.words} words were found; give more words")


@cache
def batches(setting: Setting) -> list[tuple[Tensor, dict[str, Asked], list[tuple[Tensor, Tensor]]]]:
    """The ids of every batch of contexts, what is asked about them, and the full cache's answers."""
    model, tokenizer = needle()
    rng = random.Random(setting.seed)
    made = []
    every = make_contexts(setting)
    for contexts in (every[first : first + BATCH] for first in range(0, len(every), BATCH)):
        ids = tokenizer([context.text for context in contexts], return_tensors="pt").input_ids
        picked = [question for context in contexts for question in pick_questions(rng, context, 4)]
        asked = {}
        for kind in KINDS:
            questions = [question for question in picked if question.kind == kind]
            encoded = [
                tokenizer([" " + getattr(question, part) for question in questions], add_special_tokens=False)
                for part in ("prompt", "answer")
            ]
            asked[kind] = Asked(*(torch.tensor(part.input_ids) for part in encoded), questions)
        full = DynamicCache(config=model.config)
        model(ids, **cache_argument(full), logits_to_keep=1)
        answers = [read_answers(model, repeated(full, len(one.ids) // len(ids)), one) for one in asked.values()]
        made.append((ids, asked, answers))
    return made


def repeated(cache: Cache, times: int) -> Cache:
    """A copy of a cache with every row as many times."""
    own = copy.deepcopy(cache)
    if times > 1:
        own.batch_repeat_interleave(times)
    return own


def read_answers(model: PreTrainedModel, cache: Cache, asked: Asked) -> tuple[Tensor, Tensor]:
    """The log-probabilities `[B * n, a, V]` of the words of the answers, and all attention outputs."""
    with attention_outputs(model) as outputs:
        logits = model(torch.cat([asked.ids, asked.answer_ids], dim=1), **cache_argument(cache)).logits
    first = asked.ids.shape[1] - 1
    return logits[:, first:-1].log_softmax(dim=-1), torch.stack(outputs, dim=1)[:, :, first:-1]


@contextmanager
def attention_outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collects what the attention layers put out, `[B, tokens, hidden]` each."""
    outputs: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        for layer in model.model.layers
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(given: Tensor, wanted: Tensor) -> Tensor:
    """`[rows]`, squared errors relative to the squares, of what is `[rows, ...]`, summed over the rest."""
    return (given - wanted).square().flatten(1).sum(dim=1) / wanted.square().flatten(1).sum(dim=1)


@torch.no_grad()
def measure_needle(setting: Setting, make_cache: Callable[[PreTrainedModel], Cache]) -> Measured:
    """Accuracy (of all and of each kind), KL and error of every context."""
    model, tokenizer = needle()
    measured: dict[str, list[Tensor]] = {name: [] for name in ("accuracy", *KINDS, "KL", "error")}
    for ids, asked_of_kinds, full in batches(setting):
        cache = make_cache(model)
        model(ids, **cache_argument(cache), logits_to_keep=1)
        of_kinds: dict[str, list[Tensor]] = {name: [] for name in ("accuracy", "KL", "error")}
        for asked, (full_log_probabilities, full_outputs) in zip(asked_of_kinds.values(), full, strict=True):
            times = len(asked.ids) // len(ids)
            log_probabilities, outputs = read_answers(model, repeated(cache, times), asked)
            divergence = (full_log_probabilities.exp() * (full_log_probabilities - log_probabilities)).sum(dim=-1)
            prompt = torch.cat([ids.repeat_interleave(times, dim=0), asked.ids], dim=1)
            generated = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                **cache_argument(repeated(cache, times)),
                max_new_tokens=asked.answer_ids.shape[1],
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            answers = tokenizer.batch_decode(generated[:, prompt.shape[1] :], skip_special_tokens=True)
            scores = [score(question, answer) for question, answer in zip(asked.questions, answers, strict=True)]
            of_rows = (torch.tensor(scores), divergence.mean(dim=1), relative_error(outputs, full_outputs))
            for name, values in zip(of_kinds, of_rows, strict=True):
                of_kinds[name].append(values.view(len(ids), times).mean(dim=1))
        cache.release()
        for name, values in of_kinds.items():
            measured[name].append(torch.stack(values).mean(dim=0))
        for kind, values in zip(KINDS, of_kinds["accuracy"], strict=True):
            measured[kind].append(values)
    return {name: torch.cat(values).tolist() for name, values in measured.items()}


# Synthetic tokens -----------------------------------------------------------------------------------------------------


@cache
def synthetic_model(rotary: bool) -> PreTrainedModel:
    """One layer of 8 query and 4 KV heads of 32, in which tokens attend to tokens like themselves."""
    torch.manual_seed(0)
    config = SmolLM3Config(
        vocab_size=8,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        no_rope_layers=[int(rotary)],
        use_sliding_window=False,
        pad_token_id=0,
    )
    model = SmolLM3ForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        torch.nn.init.normal_(projection.weight, std=128**-0.5)
    like = attention.k_proj.weight.data.view(4, 1, 32, 128).expand(4, 2, 32, 128).reshape(256, 128)
    attention.q_proj.weight.data = 0.7 * like + 0.5 * attention.q_proj.weight.data
    return model


@cache
def synthetic_batches(kind: str, setting: Setting) -> list[tuple[Tensor, Tensor]]:
    """Tokens `[B, words + LATER, 128]`, those that are read and those that come later, and the full cache's outputs."""
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (setting.contexts, setting.words + LATER, 128)
    tokens = torch.randn(shape, generator=generator)
    if kind != "isotropic":
        centres = torch.randn((setting.contexts, 32, 128), generator=generator)
        # some clusters are larger than others, as words are more frequent than others
        frequency = 1 / torch.arange(1.0, 33.0)
        member = torch.multinomial(frequency, shape[0] * shape[1], replacement=True, generator=generator)
        chosen = centres.gather(1, member.view(shape[0], -1, 1).expand(shape))
        tokens = chosen if kind == "repeated" else chosen + 0.5 * tokens
    model = synthetic_model(kind == "rotary")
    parts = tokens.split(BATCH)
    return [(part, later_outputs(model, part, DynamicCache(config=model.config))) for part in parts]


def later_outputs(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    """`[B, LATER, 128]`, the attention's output for the tokens that come after the context."""
    model(inputs_embeds=tokens[:, :-LATER], **cache_argument(cache))
    with attention_outputs(model) as outputs:
        model(inputs_embeds=tokens[:, -LATER:], **cache_argument(cache))
    return outputs[0]


@torch.no_grad()
def measure_synthetic(setting: Setting, kind: str, make_cache: Callable[[PreTrainedModel], Cache]) -> Measured:
    """The error of every context's attention outputs for the tokens that come after it."""
    model = synthetic_model(kind == "rotary")
    errors = []
    for tokens, wanted in synthetic_batches(kind, setting):
        cache = make_cache(model)
        errors.append(relative_error(later_outputs(model, tokens, cache), wanted))
        cache.release()
    return {"error": torch.cat(errors).tolist()}


# All of it ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One scorer, ratio and merger (a name, or JSON) on the needle model or on one kind of synthetic tokens."""

    source: str
    scorer: str
    ratio: float
    merger: str

    def merging(self, setting: Setting) -> MergingConfig:
        return MergingConfig(
            scorer={"name": "random", "seed": setting.seed} if self.scorer == "random" else self.scorer,
            budget="uniform",
            merger=read_merger(self.merger),
            compression_ratio=self.ratio,
            sink_tokens=setting.sink_tokens,
            recent_tokens=setting.recent_tokens,
        )

    def measure(self, setting: Setting) -> Measured:
        merging = self.merging(setting)

        def make_cache(model: PreTrainedModel) -> MergingDynamicCache:
            return MergingDynamicCache(model=model, merging=merging)

        if self.source == "needle":
            return measure_needle(setting, make_cache)
        return measure_synthetic(setting, self.source, make_cache)


def read_merger(text: str) -> str | dict:
    return json.loads(text) if text.startswith("{") else text


def short_name(merger: str) -> str:
    """How tables call a merger: its name, and its options behind it."""
    spec = read_merger(merger)
    if isinstance(spec, str):
        return spec
    options = ", ".join(f"{option} {json.dumps(value)}" for option, value in spec.items() if option != "name")
    return f"{spec['name']} ({options})".replace('"', "")


@dataclass(frozen=True)
class Table:
    """What was measured of scorers (rows) at ratios, by the other fields of a `Cell`."""

    results: Results
    scorers: list[str]
    mergers: list[str]
    ratios: list[float]

    def of(self, source: str, merger: str, metric: str) -> Tensor:
        """`[ratios, scorers, contexts]`."""
        cells = [[Cell(source, scorer, ratio, merger) for scorer in self.scorers] for ratio in self.ratios]
        measured = [[self.results[dataclasses.asdict(cell)][WHOLE][metric] for cell in row] for row in cells]
        return torch.tensor(measured, dtype=torch.float64)


def with_interval(differences: Tensor, digits: int) -> str:
    """The mean of all and its interval, as text."""
    low, high = bootstrap_interval(differences.flatten(0, -2).mean(dim=0))
    return f"{differences.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def needle_table(table: Table) -> Iterator[str]:
    """A row for each merger, the one that gains most first."""

    def of(merger: str, metric: str) -> Tensor:
        return table.of("needle", merger, metric)

    yield (
        "| merger | "
        + " | ".join(f"{ratio:.0%}" for ratio in table.ratios)
        + " | gain over drop | cells better, worse | worst cell | KL, against drop's | error, against drop's |"
    )
    yield "|---" * (len(table.ratios) + 6) + "|"
    dropped = {metric: of("drop", metric) for metric in ("accuracy", "KL", "error")}
    for merger in sorted(table.mergers, key=lambda merger: -of(merger, "accuracy").mean()):
        accuracy = of(merger, "accuracy")
        gain = accuracy - dropped["accuracy"]
        low, high = bootstrap_interval(gain)
        cells = [short_name(merger), *(f"{mean:.3f}" for mean in accuracy.mean(dim=(1, 2)))]
        if merger == "drop":
            cells += ["", "", "", f"{of(merger, 'KL').mean():.2f}", f"{of(merger, 'error').mean():.3f}"]
        else:
            cells += [
                with_interval(gain, 3),
                f"{int((low > 0).sum())}, {int((high < 0).sum())} of {low.numel()}",
                f"{gain.mean(dim=-1).min():+.3f}",
                with_interval(of(merger, "KL") - dropped["KL"], 2),
                with_interval(of(merger, "error") - dropped["error"], 3),
            ]
        yield "| " + " | ".join(cells) + " |"


def synthetic_table(table: Table, sources: list[str]) -> Iterator[str]:
    """A row for each merger: how much of dropping's error it leaves, and in how many cells it is better or worse."""
    yield "| merger | " + " | ".join(f"{source} | cells better, worse" for source in sources) + " |"
    yield "|---" * (2 * len(sources) + 1) + "|"
    rows = {}
    for merger in table.mergers:
        row, total = [], 0.0
        for source in sources:
            errors, dropped = (table.of(source, one, "error") for one in (merger, "drop"))
            low, high = bootstrap_interval(errors - dropped)
            left = (errors.mean() / dropped.mean()).item()
            row += [f"{left:.2f}", f"{int((high < 0).sum())}, {int((low > 0).sum())} of {low.numel()}"]
            total += left
        rows[total, short_name(merger)] = row
    for (_, name), row in sorted(rows.items()):
        yield f"| {name} | " + " | ".join(row) + " |"


def draw(table: Table, path: Path, sources: list[str]) -> None:
    """A picture of every cell: the gain in accuracy on the needle model, the share of dropping's error elsewhere."""
    mergers = [merger for merger in table.mergers if merger != "drop"]
    columns = [f"{scorer} {ratio:.0%}" for scorer in table.scorers for ratio in table.ratios]
    width, height = 2.5 + 0.62 * len(columns), 1.2 + len(sources) * (1.1 + 0.33 * len(mergers))
    figure, panels = new_figure(width, height, len(sources))
    for panel, source in zip(panels, sources, strict=True):
        answers = source == "needle"
        title = (
            "needle model: accuracy gained over dropping" if answers else f"{source} tokens: error against dropping's"
        )
        metric = "accuracy" if answers else "error"
        style = {"limit": 0.2} if answers else {"limit": 1.0, "colours": "RdBu_r", "number": "+.0%"}
        dropped = table.of(source, "drop", metric)
        rows = []
        for merger in mergers:
            difference = table.of(source, merger, metric) - dropped
            low, high = bootstrap_interval(difference)
            shown = difference.mean(-1) if answers else difference.mean(-1) / dropped.mean(-1)
            rows.append((shown.T.flatten(), ((low > 0) | (high < 0)).T.flatten()))
        numbers, is_sure = (torch.stack(part) for part in zip(*rows, strict=True))
        heat_map(panel, numbers, is_sure, [short_name(merger) for merger in mergers], columns, **style)
        panel.set_title(title, fontsize=10)
    figure.suptitle("bold: the 95% interval of the difference leaves out 0", fontsize=9)
    figure.savefig(path, dpi=75)


def quietly() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scorers",
        nargs="+",
        choices=sorted(SCORERS),
        default=["knorm", "keydiff", "snapkv", "expected_attention", "random"],
        metavar="NAME",
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    mergers = [*MERGERS, GATED, BY_KEYS, REFITTED]
    parser.add_argument("--mergers", nargs="+", default=mergers, help="names, or JSON with a name and options")
    sources = ["needle", *SYNTHETIC]
    parser.add_argument("--sources", nargs="+", choices=sources, default=sources)
    parser.add_argument("--contexts", type=int, default=200)
    parser.add_argument("--words", type=int, default=256, help="words (or synthetic tokens) of each context")
    parser.add_argument("--sink-tokens", type=int, default=2)
    parser.add_argument("--recent-tokens", type=int, default=4, help="few, for contexts this short")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument(
        "--output", type=Path, help="a file of JSON lines to keep what is measured in, and to go on from"
    )
    parser.add_argument("--plot", type=Path, help="a picture of every cell (needs matplotlib)")
    options = parser.parse_args()
    if options.plot is not None:
        import matplotlib  # noqa: F401  (better to miss it now than after everything was measured)

    mergers = list(dict.fromkeys(["drop", *options.mergers]))
    options.ratios = list(dict.fromkeys(options.ratios))
    setting = Setting(options.contexts, options.words, options.sink_tokens, options.recent_tokens, options.seed)
    try:
        if len(mergers) == 1 or 0 in options.ratios:
            raise ValueError("there is nothing to compare without another merger than drop, or at a ratio of 0")
        for cell in itertools.product(options.scorers, options.ratios, mergers):
            Cell("", *cell).merging(setting)
        if "needle" in options.sources:
            make_contexts(setting)
        results = Results(options.output, dataclasses.asdict(setting))
    except ValueError as error:
        parser.error(str(error))
    cells = [Cell(*cell) for cell in itertools.product(options.sources, options.scorers, options.ratios, mergers)]
    cells = [cell for cell in cells if dataclasses.asdict(cell) not in results]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), initializer=quietly) as pool:
        futures = [pool.submit(cell.measure, setting) for cell in cells]
        for cell, future in zip(tqdm(cells, unit="cell", desc="measuring"), futures, strict=True):
            results.add(dataclasses.asdict(cell), WHOLE, future.result())

    print(f"\n{setting.contexts} contexts of {setting.words} words, seed {setting.seed}, ", end="")
    print(f"{setting.sink_tokens} sinks and {setting.recent_tokens} recent tokens protected")
    table = Table(results, options.scorers, mergers, options.ratios)
    if "needle" in options.sources:
        print("\nneedle model: accuracy at each ratio, and means over all cells\n")
        print("\n".join(needle_table(table)))
    if synthetic := [source for source in options.sources if source != "needle"]:
        print("\nsynthetic tokens: error of the attention's output, as a share of dropping's\n")
        print("\n".join(synthetic_table(table, synthetic)))
    if options.plot is not None:
        draw(table, options.plot, options.sources)


if __name__ == "__main__":
    main()
