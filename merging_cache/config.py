"""MergingConfig: every option of a merging cache, validated in one place."""

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from .budgets import BUDGETS, AutoBudget, Budget
from .fold import Fold
from .mergers import MERGERS, QUERY_SOURCES, Merger
from .scorers import SCORERS, AutoScorer, Scorer, build_scorer
from .stage import FACTS_FILE, Spec, build_stage, check_choice, check_number, describe_stage, summarize_stage
from .states import LayerStates

DEFAULT_COMPRESSION_RATIO = 0.5
Config = TypeVar("Config")
FOLD_AT = ("prefill", "decode")


@dataclass(frozen=True)
class MergingConfig:
    """How a cache folds. Checked when made: what is wrong raises at once and names the field.

    Args:
        scorer: what is important: a name of `SCORERS`, a dict `{"name": ..., **options}`, a `Scorer`, or any callable
            `LayerStates -> [B, H, L]`. `"auto"` is `"probe"` where the cache is given the model and that can read a
            prompt again, else `"keydiff"`.
        compression_ratio: fraction of the seen tokens that loses its slot, in [0, 1): a fold leaves every head
            `max(1, floor(seen * (1 - compression_ratio)))` slots. 0.5 unless `max_tokens` is given; 0 folds nothing.
        max_tokens: instead of a ratio, at most this many slots per head after a fold.
        budget: how slots are shared among layers and heads: a name of `BUDGETS`, a dict or a `Budget`. `"auto"` is the
            scorer's own where the cache is given the model (`"profile"` for `probe`, `keydiff` and `cap`, `"global"`
            for `kvzip` and `leave_one_out`, `"pyramid"` for `pyramidkv`, `"uniform"` for the others), `"uniform"` where
            it is given its config only or the model cannot be linked; `"adakv"` for what would read the prompt again
            where a model cannot.
        merger: what becomes of the evicted: a name of `MERGERS`, a dict or a `Merger`. `"auto"` is `"refit"` where the
            cache is given the model, `"drop"` where it is given its config only or the model cannot be linked.
        calibration: the folder of a calibration of the model (`calibrate`): short for its gates as the scorer
            (`{"name": "kvzap", "weights": FOLDER}`) and its profile as the budget (`{"name": "profile", "weights":
            FOLDER}`), where these are left at their defaults.
        sink_tokens, recent_tokens: first and last tokens of each row that always keep their slot (clipped to the
            slots there are) and that nothing is merged into.
        fold_at: `"prefill"` folds at the end of each pass of several tokens, layer by layer, so memory peaks at one
            full layer; a prompt given in chunks is folded as it streams. `"decode"` folds just before the first pass
            of a single token, so a prompt in chunks gives what it gives in one piece.

    Raises:
        ValueError: for an unknown name or option, a value out of range, or both a ratio and `max_tokens`.
        TypeError: for a stage that is none of the things above.

    Example:
        >>> from merging_cache import MergingConfig
        >>> config = MergingConfig(scorer={"name": "lagkv", "lag_size": 64}, max_tokens=1024)
        >>> config.num_slots(seen=8192)
        1024
        >>> MergingConfig.from_dict(config.to_dict()) == config
        True
    """

    scorer: Spec | Scorer | Callable[[LayerStates], Tensor] = "auto"
    compression_ratio: float | None = None
    max_tokens: int | None = None
    budget: Spec | Budget = "auto"
    merger: Spec | Merger = "auto"
    sink_tokens: int = 4
    recent_tokens: int = 32
    fold_at: str = "prefill"
    calibration: str | Path | None = None

    def __post_init__(self) -> None:
        if self.compression_ratio is not None and self.max_tokens is not None:
            raise ValueError(
                f"compression_ratio={self.compression_ratio} and max_tokens={self.max_tokens} are both given, but each "
                "fixes the number of slots by itself; leave one out"
            )
        if self.compression_ratio is None and self.max_tokens is None:
            object.__setattr__(self, "compression_ratio", DEFAULT_COMPRESSION_RATIO)
        for field in ("scorer", "budget", "merger"):
            if isinstance(spec := getattr(self, field), Mapping):
                object.__setattr__(self, field, copy.deepcopy(dict(spec)))  # the caller's own may change
        if self.compression_ratio is not None:
            check_number("compression_ratio", self.compression_ratio, float)
            object.__setattr__(self, "compression_ratio", float(self.compression_ratio))
            if not 0 <= self.compression_ratio < 1:
                raise ValueError(
                    f"compression_ratio is {self.compression_ratio}; it is the fraction of tokens that loses its slot "
                    "and must be at least 0 and less than 1"
                )
        for field, minimum in (("max_tokens", 1), ("sink_tokens", 0), ("recent_tokens", 0)):
            if (count := getattr(self, field)) is not None or field != "max_tokens":
                check_number(field, count, int, minimum)
                object.__setattr__(self, field, int(count))
        check_choice("fold_at", self.fold_at, FOLD_AT)
        if self.calibration is not None:
            object.__setattr__(self, "calibration", str(self.calibration))
            if not (Path(self.calibration) / FACTS_FILE).is_file():
                raise ValueError(
                    f"calibration is {self.calibration!r}, which is no folder of a calibration; write one with "
                    "calibrate()"
                )
        fold = Fold(
            scorer=build_scorer(self._calibrated("scorer", "kvzap")),
            budget=build_stage("budget", self._calibrated("budget", "profile"), BUDGETS, Budget),
            merger=build_stage("merger", self.merger, MERGERS, Merger),
            sink_tokens=self.sink_tokens,
            recent_tokens=self.recent_tokens,
        )
        folds = {
            (linked, rereadable): dataclasses.replace(
                fold,
                scorer=(scorer := fold.scorer.resolve(linked, rereadable)),
                budget=fold.budget.resolve(linked, rereadable, scorer.default_budget),
                merger=fold.merger.resolve(linked),
            )
            for linked, rereadable in itertools.product((False, True), repeat=2)
        }
        object.__setattr__(self, "_folds", folds)

    def _calibrated(self, field: str, name: str) -> Any:
        """What a field says, or the stage of this name with what was calibrated, where it says nothing."""
        own, default = getattr(self, field), MergingConfig.__dataclass_fields__[field].default
        is_left = isinstance(own, str) and own == default
        return {"name": name, "weights": self.calibration} if self.calibration is not None and is_left else own

    def __deepcopy__(self, memo: dict[int, Any]) -> "MergingConfig":
        return self  # immutable, so copies of a cache share it (a learned scorer's weights with it)

    def num_slots(self, seen: int) -> int:
        """Slots per head after a fold of a layer that has seen this many tokens."""
        if self.max_tokens is not None:
            return min(self.max_tokens, seen)
        return max(1, math.floor(seen * (1 - self.compression_ratio)))

    def build(self, linked: bool = False, rereadable: bool = True) -> Fold:
        """The fold this config describes: always the same one, so that layers share what its stages have loaded.

        Args:
            linked, rereadable: whether the cache has the model, and whether that can read a prompt again, which is what
                `"auto"` goes by.
        """
        return self._folds[linked, rereadable]

    @property
    def label(self) -> str:
        """What tables call it, options that are the defaults left out: `"snapkv adakv mass 75%"`."""
        is_calibrated = self._calibrated("scorer", "kvzap") is not self.scorer
        budget = build_stage("budget", self.budget, BUDGETS, Budget)
        stages = [
            "calibrated" if is_calibrated else self._scorer_label,
            "" if isinstance(budget, AutoBudget) else summarize_stage(budget, BUDGETS),
            summarize_stage(build_stage("merger", self.merger, MERGERS, Merger), MERGERS | QUERY_SOURCES),
        ]
        options = {"sink_tokens": 4, "recent_tokens": 32, "fold_at": "prefill", "calibration": None}
        others = [f"{name}={getattr(self, name)}" for name, usual in options.items() if getattr(self, name) != usual]
        return " ".join(part for part in (*stages, self.size, *others) if part)

    @property
    def _scorer_label(self) -> str:
        scorer = build_scorer(self.scorer)
        return "default" if isinstance(scorer, AutoScorer) else summarize_stage(scorer, SCORERS)

    @property
    def size(self) -> str:
        """How much is evicted, as people say it: `"75%"`, `"1024 tokens"`."""
        return f"{100 * self.compression_ratio:g}%" if self.max_tokens is None else f"{self.max_tokens} tokens"

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "MergingConfig":
        """A config from `{field: value}`; unknown fields raise `ValueError`."""
        return build_config(cls, options)

    def to_dict(self) -> dict[str, Any]:
        """`{field: value}` with stages as names or dicts; stages that are not in the tables of names stay objects."""
        return {
            "scorer": describe_stage(self.scorer, SCORERS),
            "compression_ratio": self.compression_ratio,
            "max_tokens": self.max_tokens,
            "budget": describe_stage(self.budget, BUDGETS),
            "merger": describe_stage(self.merger, MERGERS | QUERY_SOURCES),
            "sink_tokens": self.sink_tokens,
            "recent_tokens": self.recent_tokens,
            "fold_at": self.fold_at,
            "calibration": self.calibration,
        }

    @classmethod
    def from_json_file(cls, path: str | Path) -> "MergingConfig":
        """Read a config written by `to_json_file` or by hand."""
        return cls.from_dict(read_options(path, "a merging config"))

    def to_json_file(self, path: str | Path) -> None:
        """Write the config as JSON.

        Raises:
            ValueError: if a stage is an object of your own, which JSON cannot hold.
        """
        options = self.to_dict()
        for field in ("scorer", "budget", "merger"):
            if not isinstance(options[field], (str, dict)):
                raise ValueError(
                    f"{field} is {options[field]!r}, which JSON cannot hold; make its class a dataclass and add it "
                    f"to the table of {field}s (merging_cache.{field}s.{field.upper()}S) under a name first"
                )
        try:
            text = json.dumps(options, indent=2)
        except TypeError as error:
            raise ValueError(f"the config holds what JSON cannot: {error}; give stages as names and dicts") from error
        Path(path).write_text(text + "\n", encoding="utf-8")


def build_config(kind: type[Config], options: Mapping[str, Any]) -> Config:
    """A dataclass of options from `{field: value}`; unknown fields raise `ValueError`."""
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; the options are {known}")
    return kind(**options)


def read_options(path: str | Path, what: str) -> dict[str, Any]:
    """The options in a JSON file that holds `what`, `"a merging config"` say; `ValueError` if it does not."""
    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} could not be read as {what} in JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds a JSON {type(options).__name__}; {what} is an object of options")
    return options


def resolve_config(
    merging: "MergingConfig | Mapping[str, Any] | str | Path | None", options: dict[str, Any]
) -> MergingConfig:
    """What a cache was given: a config, a dict or a JSON file, with single options on top."""
    if merging is None:
        return MergingConfig.from_dict(options)
    if isinstance(merging, str) and merging in SCORERS:
        raise ValueError(f"merging is {merging!r}, the name of a scorer and of no JSON file; give scorer={merging!r}")
    if isinstance(merging, (str, Path)):
        merging = MergingConfig.from_json_file(merging)
    if isinstance(merging, MergingConfig):
        if not options:
            return merging
        merging = {field.name: getattr(merging, field.name) for field in dataclasses.fields(merging)}
    if not isinstance(merging, Mapping):
        raise TypeError(
            f"merging is {merging!r}; give a MergingConfig, a dict of its fields or a path to its JSON file"
        )
    merged = dict(merging)
    sizes = ("compression_ratio", "max_tokens")
    if sum(options.get(size) is not None for size in sizes) == 1:  # the one given replaces the other
        for size in sizes:
            merged.pop(size, None)
    return MergingConfig.from_dict(merged | options)
