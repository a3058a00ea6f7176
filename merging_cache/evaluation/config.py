"""EvaluationConfig: what is to be measured, checked before any work starts."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..budgets import BUDGETS
from ..budgets.threshold import ThresholdBudget
from ..cache import MergingDynamicCache, MergingQuantizedCache
from ..config import MergingConfig
from ..mergers import MERGERS, QUERY_SOURCES
from ..quantized import make_backend
from ..scorers import SCORERS
from ..stage import Spec, check_number, summarize_stage
from .ruler import RULER

FULL = "full cache"
TEXT = "text"
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
    budget: Spec | None = None
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
        if isinstance(self.merging.build().budget, ThresholdBudget):
            return ""
        return f"{100 * self.compression_ratio:g}%" if self.max_tokens is None else f"{self.max_tokens} tokens"

    @property
    def how(self) -> dict[str, str]:
        """The parts of its name by what they are, those left out that are the defaults."""
        if self.is_full:
            return {"scorer": FULL, "budget": "", "merger": "", "size": "", "quantize": ""}
        fold = self.merging.build(linked=True)
        merger = self.merger if isinstance(self.merger, str) else summarize_stage(fold.merger, MERGERS | QUERY_SOURCES)
        return {
            "scorer": summarize_stage(fold.scorer, SCORERS),
            "budget": "" if self.budget is None else summarize_stage(fold.budget, BUDGETS),
            "merger": merger,
            "size": self.size,
            "quantize": "" if self.quantize == DENSE else self.quantize,
        }

    @property
    def label(self) -> str:
        """What tables and plots call it."""
        return " ".join(part for part in self.how.values() if part)

    def to_dict(self) -> dict[str, Any]:
        """Its fields, those left out that are the defaults."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value != getattr(Variant, name)}


def parse_quantize(name: str) -> tuple[str, int | None]:
    """`"quanto-4"` to `("quanto", 4)`.

    Raises:
        ValueError: for an unknown backend or number of bits.
    """
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
        model: a folder or a name on the hub; `None` for the small model that ships with this project.
        tasks: names of `RULER`; `None` for all that can be made of what is given.
        context_length: tokens of a prompt and the longest answer to it: one length or several; `None` for 512 with the
            shipped model, else 4096.
        scorers, budgets, mergers: names, or dicts with a name and options; `None` as a budget is the scorer's own.
            `"drop"` is always measured, since merging is judged against it.
        compression_ratios, max_tokens: sizes of the cache; both kinds may be given.
        quantize: `"none"`, or backend and bits, such as `"quanto-4"`.
        grids: instead of one product of these seven, several: dicts with any of them.
        examples: how many of each task.
        question_in_context: whether the question is read before the fold, so that scorers know it.
        batch_size: examples read and answered at a time, padded on the left.
        seed: from which everything random is drawn.
        sink_tokens, recent_tokens: first and last tokens that always keep their slots, as in `MergingConfig`.
        depth: share of the haystack before a needle, in [0, 1]; random if `None`, as in RULER.
        haystack, squad, hotpotqa: files for the tasks that need one (see `English`).
        data: ready-made examples instead of generated ones (see `read_examples`).
        data_folder: folder or configuration of a data set on the hub; the context length if `None`.
        text: a text file, for the loss on what follows a folded context and the divergence from the full cache.
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
    budgets: Sequence[Spec | None] = (None,)
    mergers: Sequence[Spec] = ("drop", "similarity", "auto")
    compression_ratios: Sequence[float] = (0.5, 0.75)
    max_tokens: Sequence[int] = ()
    quantize: Sequence[str] = (DENSE,)
    grids: Sequence[Mapping[str, Any]] = ()
    examples: int = 40
    question_in_context: bool = False
    batch_size: int = 10
    seed: int = 0
    sink_tokens: int = 4
    recent_tokens: int = 32
    depth: float | None = None
    haystack: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    data: str | None = None
    data_folder: str | None = None
    text: str | None = None
    chat: bool | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    device_map: str | None = None
    tp_plan: str | None = None

    SWEPT = ("scorers", "budgets", "mergers", "compression_ratios", "max_tokens", "quantize")

    def __post_init__(self) -> None:
        check_number("examples", self.examples, int, minimum=1)
        check_number("batch_size", self.batch_size, int, minimum=1)
        check_number("seed", self.seed, int)
        if self.depth is not None:
            check_number("depth", self.depth, float, minimum=0, maximum=1)
        for length in self.lengths:
            check_number("context_length", length, int, minimum=16)
        for task in self.tasks or ():
            if task not in RULER:
                raise ValueError(f"unknown task {task!r}; choose of {list(RULER)}")
        for name in ("haystack", "squad", "hotpotqa", "text"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ValueError(f"{name} is {str(path)!r}, and there is no such file")
        if self.device_map is not None and self.tp_plan is not None:
            raise ValueError("device_map and tp_plan are both given, but each says where the weights go; leave one out")
        self.variants  # noqa: B018  (raises for what cannot be built)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The context lengths."""
        if self.context_length is None:
            return (512,) if self.model is None else (4096,)
        return tuple(self.context_length) if isinstance(self.context_length, Sequence) else (self.context_length,)

    @property
    def variants(self) -> list[Variant]:
        """The full cache, then every cache of the sweep, each once."""
        found = {Variant().label: Variant()}
        for grid in self.grids or ({},):
            unknown = [name for name in grid if name not in self.SWEPT]
            if unknown:
                raise ValueError(f"a grid names {unknown[0]!r}; it may name {list(self.SWEPT)}")
            for variant in self._product(*({name: getattr(self, name) for name in self.SWEPT} | dict(grid)).values()):
                found.setdefault(variant.label, variant)
        return list(found.values())

    def _product(self, scorers, budgets, mergers, ratios, max_tokens, quantize) -> Iterator[Variant]:
        mergers = ["drop", *(merger for merger in mergers if merger not in ("drop", {"name": "drop"}))]
        sizes = [(ratio, None) for ratio in ratios] + [(None, count) for count in max_tokens]
        for (ratio, count), storage, scorer, budget, merger in itertools.product(
            sizes, quantize, scorers, budgets, mergers
        ):
            if storage != DENSE:
                parse_quantize(storage)
            yield Variant(scorer, budget, merger, ratio, count, storage, self.sink_tokens, self.recent_tokens)

    @property
    def setting(self) -> dict[str, Any]:
        """What all cells of its results have in common, as JSON holds it."""
        own = (*self.SWEPT, "grids", "tasks", "context_length", "device_map", "tp_plan", "text")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in own}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "EvaluationConfig":
        """A config from `{field: value}`; unknown fields raise `ValueError`."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; the options are {known}")
        return cls(**options)

    @staticmethod
    def read_options(path: str | Path) -> dict[str, Any]:
        """The options in a JSON file.

        Raises:
            ValueError: if it cannot be read, or holds something else.
        """
        try:
            options = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} could not be read as options in JSON: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(f"{path} holds a JSON {type(options).__name__}; expected an object of options")
        return options
