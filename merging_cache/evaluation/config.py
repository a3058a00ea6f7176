"""EvaluationConfig: what is to be measured, checked before any work starts."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..budgets import BUDGETS
from ..budgets.threshold import ThresholdBudget
from ..cache import MergingDynamicCache
from ..config import MergingConfig, build_config, read_options
from ..mergers import MERGERS, QUERY_SOURCES
from ..model import SHIPPED_MODELS
from ..quantized_cache import MergingQuantizedCache
from ..reading import FULL
from ..scorers import SCORERS
from ..stage import Spec, check_choice, check_number, check_options, option, summarize_stage
from ..storage import make_backend
from .results import key_of
from .tasks import TASKS

DENSE = "none"


@dataclass(frozen=True)
class Variant:
    """One way to hold a cache: the full one where no scorer is named.

    Args:
        scorer, budget, merger, compression_ratio, max_tokens: as in `MergingConfig`.
        quantize: `"none"`, or backend and bits, such as `"quanto-4"`.
        sink_tokens, recent_tokens: as in `MergingConfig`; the same for all caches of a sweep, and not in their names.
    """

    scorer: Spec | None = None
    budget: Spec = "auto"
    merger: Spec | None = None
    compression_ratio: float | None = None
    max_tokens: int | None = None
    quantize: str = DENSE
    sink_tokens: int = 4
    recent_tokens: int = 32

    @property
    def is_full(self) -> bool:
        """Whether nothing is evicted or quantized: `DynamicCache` itself."""
        return self.scorer is None

    @property
    def merging(self) -> MergingConfig:
        """How the cache folds."""
        fields = dataclasses.asdict(self)
        del fields["quantize"]
        return MergingConfig(**fields)

    @property
    def merges(self) -> bool:
        """Whether anything becomes of the evicted."""
        return self.merger not in (None, "drop")

    @property
    def dropping(self) -> "Variant":
        """The same without merging: what the gain of merging is taken against."""
        return self if self.is_full else dataclasses.replace(self, merger="drop")

    def make_cache(self, model: Any) -> MergingDynamicCache:
        """A new cache for a model.

        Raises:
            ValueError: if the model does not go with it.
        """
        if self.quantize == DENSE:
            return MergingDynamicCache(model=model, merging=self.merging)
        backend, nbits = parse_quantize(self.quantize)
        return MergingQuantizedCache(backend, nbits=nbits, model=model, merging=self.merging)

    @property
    def size(self) -> str:
        """How much is evicted, as people say it; nothing where that is up to the scores."""
        if self.compression_ratio is None and self.max_tokens is None:
            return ""
        return self.merging.size

    @property
    def how(self) -> dict[str, str]:
        """The parts of its name by what they are, those left out that are the defaults."""
        if self.is_full:
            return {"scorer": FULL, "budget": "", "merger": "", "size": "", "quantize": ""}
        fold = self.merging.build(linked=True)
        merger = self.merger if isinstance(self.merger, str) else summarize_stage(fold.merger, MERGERS | QUERY_SOURCES)
        return {
            "scorer": summarize_stage(fold.scorer, SCORERS),
            "budget": "" if self.budget == "auto" else summarize_stage(fold.budget, BUDGETS),
            "merger": merger,
            "size": self.size,
            "quantize": "" if self.quantize == DENSE else self.quantize,
        }

    @property
    def label(self) -> str:
        """What tables and plots call it."""
        return " ".join(part for part in self.how.values() if part)

    @property
    def key(self) -> str:
        """What tells it from others; labels may not."""
        return key_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Its fields, those left out that are the defaults."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value != getattr(Variant, name)}


def parse_quantize(name: str) -> tuple[str, int | None]:
    """`"quanto-4"` to `("quanto", 4)`.

    Raises:
        ValueError: for an unknown backend or number of bits.
        TypeError: for what is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"quantize is {name!r}; give 'none', or a backend and bits, such as 'quanto-4'")
    backend, _, bits = name.partition("-")
    if bits and not bits.isdigit():
        raise ValueError(f"quantize is {name!r}; give 'none', or a backend and bits, such as 'quanto-4'")
    nbits = int(bits) if bits else None
    try:
        make_backend(backend, nbits, None, None, None)
    except ImportError as error:
        raise ValueError(f"quantize={name!r}: {error}") from error
    return backend, nbits


@dataclass(frozen=True)
class EvaluationConfig:
    """A sweep: every task with every scorer, budget, merger, size and storage, and with the full cache.

    Everything is checked when it is made, so that nothing goes wrong hours later for a reason known before.

    Args:
        model: a name that `load_model` takes; `None` for the small model that ships with this project.
        tasks: names of `TASKS`; `None` for all that can be made of what is given.
        context_length: tokens of a prompt and the longest answer to it: one length or several; `None` for 512 with the
            shipped model, 1024 with models that packages ship, else 4096.
        scorers, budgets, mergers: names, or dicts with a name and options; `"auto"` as a budget is the scorer's own.
            `"drop"` is always measured, since merging is judged against it.
        compression_ratios, max_tokens: sizes of the cache; both kinds may be given, or neither: the full cache only.
        quantize: `"none"`, or backend and bits, such as `"quanto-4"`.
        grids: instead of one product of these six, several: dicts with any of them.
        examples: how many of each task.
        question_in_context: whether the question is read before the fold, so that scorers know it.
        generate: whether RULER's tasks are answered by generation, as RULER has it; otherwise, as with the tasks about
            prose, an answer is right if the model would have given the reference word for word, which is much faster.
        batch_size: contexts read at a time at most, padded on the left; `None` for 10 with the shipped model, else 1. A
            ratio counts padding (see the README), so where contexts differ in length short ones keep more slots than
            they would alone; with a batch size of 1, or with `max_tokens`, they do not.
        seed: from which everything random is drawn.
        sink_tokens, recent_tokens: first and last tokens that always keep their slots, as in `MergingConfig`.
        depth: share of the haystack before a needle, in [0, 1]; random if `None`, as in RULER.
        haystack: text files to hide things in; half of Python's own language reference if there are none.
        squad, hotpotqa: files for the tasks that need one (see `English`).
        data: ready-made examples instead of generated ones (see `read_examples`).
        data_folder: folder or configuration of a data set on the hub; the context length if `None`.
        chat: whether prompts go through the tokenizer's chat template; if `None`, where it has one.
        dtype, attn_implementation, device_map, tp_plan: as for `from_pretrained`.

    Raises:
        ValueError: for unknown names, options out of range, and files that are not there.
        TypeError: for values of another type.
    """

    model: str | None = None
    tasks: Sequence[str] | None = None
    context_length: Sequence[int] | int | None = None
    scorers: Sequence[Spec] = ("keydiff", "snapkv")
    budgets: Sequence[Spec] = ("auto",)
    mergers: Sequence[Spec] = ("drop", "similarity", "auto")
    compression_ratios: Sequence[float] = (0.5, 0.75)
    max_tokens: Sequence[int] = ()
    quantize: Sequence[str] = (DENSE,)
    grids: Sequence[Mapping[str, Any]] = ()
    examples: int = option(40, minimum=1)
    question_in_context: bool = False
    generate: bool = True
    batch_size: int | None = option(None, minimum=1)
    seed: int = option(0)
    sink_tokens: int = option(4, minimum=0)
    recent_tokens: int = option(32, minimum=0)
    depth: float | None = option(None, minimum=0, maximum=1)
    haystack: Sequence[str] = ()
    squad: str | None = None
    hotpotqa: str | None = None
    data: str | None = None
    data_folder: str | None = None
    chat: bool | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    device_map: str | None = None
    tp_plan: str | None = None

    SWEPT = ("scorers", "budgets", "mergers", "compression_ratios", "max_tokens", "quantize")
    FILES = ("squad", "hotpotqa")

    def __post_init__(self) -> None:
        check_options(self)
        for length in self.lengths:
            check_number("context_length", length, int, minimum=16)
        if self.tasks is not None:
            check_list("tasks", self.tasks)
            for task in self.tasks:
                check_choice("tasks", task, tuple(TASKS))
        for field in dataclasses.fields(self):
            if getattr(self, field.name) == "":
                raise ValueError(f"{field.name} is empty; leave it out instead")
        check_list("haystack", self.haystack, least=0)
        files = [(name, getattr(self, name)) for name in self.FILES] + [("haystack", path) for path in self.haystack]
        for name, path in files:
            if path is not None and not Path(path).is_file():
                raise ValueError(f"{name} is {str(path)!r}, and there is no such file")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}; give 'auto' or the name of one of torch's, such as 'bfloat16'")
        if self.device_map is not None and self.tp_plan is not None:
            raise ValueError("device_map and tp_plan are both given, but each says where the weights go; leave one out")
        self.variants  # noqa: B018  (raises for what cannot be built)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The context lengths."""
        if self.context_length is None:
            return (512,) if self.model is None else (1024,) if self.model in SHIPPED_MODELS else (4096,)
        if isinstance(self.context_length, int):
            return (self.context_length,)
        check_list("context_length", self.context_length)
        return tuple(dict.fromkeys(self.context_length))

    @property
    def variants(self) -> list[Variant]:
        """The full cache, then every cache of the sweep, each once."""
        found = {Variant().key: Variant()}
        check_list("grids", self.grids, least=0)
        for grid in self.grids or ({},):
            if not isinstance(grid, Mapping):
                raise TypeError(f"grids holds {grid!r}; a grid is a dict with any of {list(self.SWEPT)}")
            unknown = [name for name in grid if name not in self.SWEPT]
            if unknown:
                raise ValueError(f"a grid names {unknown[0]!r}; it may name {list(self.SWEPT)}")
            for variant in self._product(**{name: grid.get(name, getattr(self, name)) for name in self.SWEPT}):
                found.setdefault(variant.key, variant)
        return list(found.values())

    def _product(self, **swept: Sequence[Any]) -> Iterator[Variant]:
        for name, values in swept.items():
            check_list(name, values, least=0 if name in ("compression_ratios", "max_tokens") else 1)
            if None in values:
                raise ValueError(f"{name} holds null; leave it out")
        # what is a name alone is one however it is spelled
        swept = {name: [spelled(value) for value in values] for name, values in swept.items()}
        mergers = ["drop", *(merger for merger in swept["mergers"] if merger != "drop")]
        sizes = [(ratio, None) for ratio in swept["compression_ratios"]]
        sizes += [(None, count) for count in swept["max_tokens"]]
        product = itertools.product(sizes, swept["quantize"], swept["scorers"], swept["budgets"], mergers)
        for (ratio, count), storage, scorer, budget, merger in product:
            if storage != DENSE:
                parse_quantize(storage)
            if scorer == "random":
                scorer = {"name": "random", "seed": self.seed}  # all mergers are to fold the same tokens
            variant = Variant(scorer, budget, merger, ratio, count, storage, self.sink_tokens, self.recent_tokens)
            # checked with the size that was given, before one that says nothing is left out
            free = isinstance(variant.merging.build().budget, ThresholdBudget)
            yield dataclasses.replace(variant, compression_ratio=None, max_tokens=None) if free else variant

    @property
    def setting(self) -> dict[str, Any]:
        """What all cells of its results have in common, as JSON holds it; of files, what they hold."""
        own = [*self.SWEPT, "grids", "tasks", "context_length", "device_map", "tp_plan"]
        own += ["examples"] if self.data is None else []  # of a data set as many are drawn
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in own}
        named |= {name: fingerprint(named[name]) for name in ("squad", "hotpotqa", "data")}
        return named | {"haystack": [fingerprint(path) for path in self.haystack], "batch_size": self.rows_at_a_time}

    @property
    def rows_at_a_time(self) -> int:
        """The batch size."""
        return self.batch_size or (10 if self.model is None else 1)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "EvaluationConfig":
        """A config from `{field: value}`; unknown fields raise `ValueError`."""
        return build_config(cls, options)

    @classmethod
    def from_json_file(cls, path: str | Path) -> "EvaluationConfig":
        """Read a config, such as `examples/ruler_qwen3_8b.json`."""
        return cls.from_dict(read_options(path, "an evaluation config"))


def spelled(value: Any) -> Any:
    """A stage without options as its name."""
    if isinstance(value, Mapping) and set(value) == {"name"}:
        return value["name"]
    return value


def check_list(name: str, values: Any, least: int = 1) -> None:
    """Refuse what is no list, or has fewer than `least` entries."""
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise TypeError(f"{name} is {values!r}; give a list")
    if len(values) < least:
        raise ValueError(f"{name} is an empty list; name one at least, or leave it out")


def fingerprint(source: str | None, name: str | None = None) -> str | None:
    """What a file or folder is called (or `name`) and holds, so that a change of it is noticed; others as they are.

    Of files above 64 MB it is their size.
    """
    if source is None or not Path(source).exists():
        return source
    path = Path(source)
    digest = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)} {size} ".encode())
        digest.update(file.read_bytes() if size < 1 << 26 else b"")
    return f"{name or source} ({digest.hexdigest()[:16]})"
