"""MergingConfig: every option of a merging cache, validated in one place."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from .budgets import BUDGETS, Budget
from .fold import Fold
from .mergers import MERGERS, Merger
from .scorers import SCORERS, FunctionScorer, Scorer
from .states import LayerStates

Stage = TypeVar("Stage", Scorer, Budget, Merger)
Spec = str | Mapping[str, Any]

DEFAULT_COMPRESSION_RATIO = 0.5
FOLD_AT = ("prefill", "decode")


@dataclass(frozen=True)
class MergingConfig:
    """How a cache folds. Checked when made: what is wrong raises at once and names the field.

    Args:
        scorer: what is important: a name of `SCORERS`, a dict `{"name": ..., **options}`, a `Scorer`, or any callable
            `LayerStates -> [B, H, L]`.
        compression_ratio: fraction of the seen tokens that loses its slot, in [0, 1): a fold leaves every head
            `max(1, floor(seen * (1 - compression_ratio)))` slots. 0.5 unless `max_tokens` is given; 0 folds nothing.
        max_tokens: instead of a ratio, at most this many slots per head after a fold.
        budget: how slots are shared among layers and heads: a name of `BUDGETS`, a dict or a `Budget`. `"uniform"`,
            except for scorers that come with a budget of their own (`pyramidkv`).
        merger: what becomes of the evicted: a name of `MERGERS`, a dict or a `Merger`.
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

    scorer: Spec | Scorer | Callable[[LayerStates], Tensor] = "keydiff"
    compression_ratio: float | None = None
    max_tokens: int | None = None
    budget: Spec | Budget | None = None
    merger: Spec | Merger = "similarity"
    sink_tokens: int = 4
    recent_tokens: int = 32
    fold_at: str = "prefill"

    def __post_init__(self) -> None:
        if self.compression_ratio is not None and self.max_tokens is not None:
            raise ValueError(
                f"compression_ratio={self.compression_ratio} and max_tokens={self.max_tokens} are both given, but each "
                "fixes the number of slots by itself; leave one out"
            )
        if self.compression_ratio is None and self.max_tokens is None:
            object.__setattr__(self, "compression_ratio", DEFAULT_COMPRESSION_RATIO)
        if self.compression_ratio is not None:
            check_number("compression_ratio", self.compression_ratio, float)
            if not 0 <= self.compression_ratio < 1:
                raise ValueError(
                    f"compression_ratio is {self.compression_ratio}; it is the fraction of tokens that loses its slot "
                    "and must be at least 0 and less than 1"
                )
        if self.max_tokens is not None:
            check_number("max_tokens", self.max_tokens, int, minimum=1)
        check_number("sink_tokens", self.sink_tokens, int, minimum=0)
        check_number("recent_tokens", self.recent_tokens, int, minimum=0)
        if self.fold_at not in FOLD_AT:
            raise ValueError(f"fold_at is {self.fold_at!r}; choose one of {list(FOLD_AT)}")
        if self.budget is None:
            scorer = build_stage("scorer", self._scorer, SCORERS, Scorer)
            object.__setattr__(self, "budget", scorer.default_budget)
        self.build()

    def __deepcopy__(self, memo: dict[int, Any]) -> "MergingConfig":
        return self  # immutable, so copies of a cache share it (a learned scorer's weights with it)

    def num_slots(self, seen: int) -> int:
        """Slots per head after a fold of a layer that has seen this many tokens."""
        if self.max_tokens is not None:
            return min(self.max_tokens, seen)
        return max(1, math.floor(seen * (1 - self.compression_ratio)))

    def build(self) -> Fold:
        """The fold this config describes."""
        return Fold(
            scorer=build_stage("scorer", self._scorer, SCORERS, Scorer),
            budget=build_stage("budget", self.budget, BUDGETS, Budget),
            merger=build_stage("merger", self.merger, MERGERS, Merger),
            sink_tokens=self.sink_tokens,
            recent_tokens=self.recent_tokens,
        )

    @property
    def _scorer(self) -> Spec | Scorer:
        """The scorer, a plain callable made into one."""
        function = callable(self.scorer) and not isinstance(self.scorer, (Scorer, type))
        return FunctionScorer(self.scorer) if function else self.scorer

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "MergingConfig":
        """A config from `{field: value}`; unknown fields raise `ValueError`."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; the options are {known}")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """`{field: value}` with stages as names or dicts; stages that are not in the tables of names stay objects."""
        return {
            "scorer": describe_stage(self.scorer, SCORERS),
            "compression_ratio": self.compression_ratio,
            "max_tokens": self.max_tokens,
            "budget": describe_stage(self.budget, BUDGETS),
            "merger": describe_stage(self.merger, MERGERS),
            "sink_tokens": self.sink_tokens,
            "recent_tokens": self.recent_tokens,
            "fold_at": self.fold_at,
        }

    @classmethod
    def from_json_file(cls, path: str | Path) -> "MergingConfig":
        """Read a config written by `to_json_file` or by hand."""
        options = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(options, dict):
            raise ValueError(f"{path} holds a JSON {type(options).__name__}; a merging config is an object of options")
        return cls.from_dict(options)

    def to_json_file(self, path: str | Path) -> None:
        """Write the config as JSON.

        Raises:
            ValueError: if a stage is an object of your own, which JSON cannot hold.
        """
        options = self.to_dict()
        for field in ("scorer", "budget", "merger"):
            if not isinstance(options[field], (str, dict)):
                raise ValueError(
                    f"{field} is {options[field]!r}, which JSON cannot hold; add its class to the table of {field}s "
                    f"(merging_cache.{field}s.{field.upper()}S) under a name first"
                )
        Path(path).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def resolve_config(
    merging: "MergingConfig | Mapping[str, Any] | str | Path | None", options: dict[str, Any]
) -> MergingConfig:
    """What a cache was given: a config, a dict or a JSON file, with single options on top."""
    if merging is None:
        return MergingConfig.from_dict(options)
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
    if ("max_tokens" in options) != ("compression_ratio" in options):  # the one given replaces the other
        merged.pop("compression_ratio", None)
        merged.pop("max_tokens", None)
    return MergingConfig.from_dict(merged | options)


def build_stage(field: str, spec: Spec | Stage, table: dict[str, type[Stage]], kind: type[Stage]) -> Stage:
    """A stage from its name, its dict, or itself."""
    if isinstance(spec, kind):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise TypeError(
            f"{field} is {spec!r}; give a name, a dict with a name and options, or a {kind.__name__} object"
        )
    options = dict(spec)
    name = options.pop("name", None)
    if name not in table:
        raise ValueError(f"unknown {field} {name!r}; choose one of {sorted(table)}")
    try:
        return table[name](**options)
    except TypeError as error:
        known = (
            [option.name for option in dataclasses.fields(table[name])] if dataclasses.is_dataclass(table[name]) else []
        )
        raise ValueError(f"{field} {name!r} does not take {options}; its options are {known}") from error


def describe_stage(spec: Any, table: dict[str, type]) -> Any:
    """The inverse of `build_stage` where there is one."""
    if isinstance(spec, Mapping):
        return dict(spec)
    for name, stage in table.items():
        if type(spec) is stage and dataclasses.is_dataclass(spec):
            return {"name": name, **dataclasses.asdict(spec)}
    return spec


def check_number(field: str, value: Any, kind: type, minimum: int | None = None) -> None:
    """Refuse what is not an int (or for `float`, any real number), or is below `minimum`."""
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise TypeError(f"{field} is {value!r}; it must be {'a number' if kind is float else 'an integer'}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{field} is {value}; it must be at least {minimum}")
