"""What scorers, budgets and mergers have in common: their options, and what they need to see beyond keys and values."""

import dataclasses
import inspect
import json
import math
import types
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from .states import LayerStates, Statistics

FACTS_FILE = "calibration.json"  # what is known of a calibration, in its folder
Kind = TypeVar("Kind", bound="Stage")
Spec = str | Mapping[str, Any]


class Stage:
    """One of the three stages of a fold: a dataclass whose fields are its options.

    Options that are numbers, truth values or choices are checked when a stage is made, by their annotations and by the
    bounds that `option` states.

    Keys and values reach every cache. The rest comes from the model's attention, so a cache whose stages need any of it
    has to be given the model: `MergingDynamicCache(model=model, ...)`.
    """

    needs_queries: bool = False
    """True if the stage reads `states.queries`, or a scorer's `observe` does."""
    query_window: int = 64
    """How many of the last queries `states.queries` should hold, where `needs_queries`."""
    needs_hidden_states: bool = False
    """True if `observe` reads `states.hidden_states`."""
    needs_rotary: bool = False
    """True if the stage reads `states.rotary`."""
    uses_rotary: bool = False
    """True if the stage reads `states.rotary` where it can be made out, and can do without."""
    needs_module: bool = False
    """True if the stage reads `states.module`."""
    reads_again: bool = False
    """True for a stage that is shown what attends to each token while the model reads the prompt, or a part of it, once
    more; see `observe_again`."""
    needs_outputs: bool = False
    """True if `observe_again` reads what is in `states.again` besides `weights` and `norms`."""
    again_tokens: int | None = None
    """How many tokens from the middle of the prompt are enough then; `None` for all of it."""
    chunk_size: int = 2048
    """How many are read at a time."""
    learns: bool = False
    """True for a `Learner`, which remembers for the model's life what it makes of that."""

    def __post_init__(self) -> None:
        check_options(self)

    def check_model(self, config: Any, layers: Sequence[int]) -> None:
        """Refuse a model that the stage was not made for.

        Args:
            config: that of the part of the model that generates text.
            layers: the indices of those that fold.

        Raises:
            ValueError: if it was not.
        """

    def observe(self, states: LayerStates, new: int) -> Statistics | None:
        """Remember something about a pass of the prompt, so that nothing of its length need be kept until the fold.

        Called after the attention of each pass over several tokens with all stored tokens, the last `new` of which came
        with it. `states.queries` then holds the query window of earlier passes followed by all queries of this one,
        `states.hidden_states` those of the new tokens, `states.statistics` what the last call returned (with zeros for
        new tokens). What is returned comes back in `states.statistics`, here and when the stage is run; after a fold
        floats that were kept per token have 16 bits left.
        """
        return None

    def observe_again(self, states: LayerStates) -> Statistics:
        """Remember something about tokens that are read again, where the stage `reads_again`.

        `states.again` says what some of them attend to, `states.statistics` what the last call returned. They see all
        stored tokens and, of themselves, those before them. Rows come as they are stored, with padding and where heads
        have different numbers of tokens: weights are 0 where there is nothing.
        """
        raise NotImplementedError

    def settle(self, statistics: Statistics, folded: Tensor) -> Statistics | None:
        """What to go on remembering once a fold is done: all of it, or less where later folds can do with less.

        `folded` `[B]` says which rows lost tokens; the others have to stay as they are.
        """
        return statistics

    @property
    def observes(self) -> bool:
        """Whether the stage has to be shown the passes of a prompt."""
        return self.needs_queries or type(self).observe is not Stage.observe

    @property
    def stage_name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    @property
    def needs_attention(self) -> bool:
        """Whether the stage can do with keys and values alone (False), or not."""
        sees = self.needs_queries or self.needs_hidden_states or self.reads_again
        return sees or self.needs_rotary or self.needs_module


def check_calibrated_for(folder: str, config: Any, layers: Sequence[int]) -> None:
    """Refuse the folder of a calibration that was made for another model; one that says nothing of that may go.

    Args:
        folder: the folder.
        config: that of the part of the model that generates text.
        layers: the indices of those that fold.

    Raises:
        ValueError: if it was made for a model of another name, width or other layers.
    """
    path = Path(folder) / FACTS_FILE
    if not path.is_file():
        return
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        made_for, shape = facts["model"], (facts["hidden_size"], facts["layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} could not be read as that of a calibration: {error}") from error
    name = Path(getattr(config, "name_or_path", None) or "unnamed").name
    if made_for != name:
        raise ValueError(
            f"{folder} was calibrated for {made_for}, but this model is {name}. Calibrate this one, or, if it is the "
            f'same under another name, write that as "model" into {path}'
        )
    if shape != (config.hidden_size, list(layers)):
        raise ValueError(
            f"{folder} was calibrated for a {made_for} of width {shape[0]} of which layers {shape[1]} fold, but the "
            f"width of this one is {config.hidden_size}, and layers {list(layers)} fold. Calibrate this one"
        )


def option(default: Any, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A dataclass field for a number between two bounds, both allowed."""
    return dataclasses.field(default=default, metadata={"minimum": minimum, "maximum": maximum})


def check_options(stage: Any) -> None:
    """Check the fields of a dataclass that are annotated as plain numbers, truth values, strings or choices.

    Raises:
        TypeError: for a value of another type than its annotation.
        ValueError: for a number out of bounds, or none of the choices.
    """
    try:
        annotations = get_type_hints(type(stage))
    except NameError:  # names that only a type checker knows
        return
    for field in dataclasses.fields(stage):
        if not field.init:
            continue
        value, kind = getattr(stage, field.name), annotations[field.name]
        if get_origin(kind) in (Union, types.UnionType):
            kinds = [one for one in get_args(kind) if one is not type(None)]
            if value is None or len(kinds) > 1:
                continue
            kind = kinds[0]
        if kind in (int, float):
            check_number(field.name, value, kind, field.metadata.get("minimum"), field.metadata.get("maximum"))
        elif kind in (bool, str) and not isinstance(value, kind):
            raise TypeError(f"{field.name} is {value!r}; it must be {'True or False' if kind is bool else 'a string'}")
        elif get_origin(kind) is Literal:
            check_choice(field.name, value, get_args(kind))


def check_number(
    field: str, value: Any, kind: type, minimum: float | None = None, maximum: float | None = None
) -> None:
    """Refuse what is not a whole number (or for `float`, any real number), or lies out of bounds."""
    if isinstance(value, bool) or not isinstance(value, Real if kind is float else Integral):
        raise TypeError(f"{field} is {value!r}; it must be {'a number' if kind is float else 'an integer'}")
    if math.isnan(value):
        raise ValueError(f"{field} is {value}; it must be a number")
    if minimum is not None and not value >= minimum:  # NaN is refused too
        raise ValueError(f"{field} is {value}; it must be at least {minimum}")
    if maximum is not None and not value <= maximum:
        raise ValueError(f"{field} is {value}; it must be at most {maximum}")


def check_choice(field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse what is none of the choices."""
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"{field} is {value!r}; choose one of {list(allowed)}")


def build_stage(field: str, spec: Any, table: dict[str, type[Kind]], kind: type[Kind]) -> Kind:
    """A stage from its name, its dict, or itself."""
    if isinstance(spec, kind):
        return spec
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise TypeError(
            f"{field} is {spec!r}; give a name, a dict with a name and options, or a {kind.__name__} object"
            + (", or a function of a layer's states" if field == "scorer" else "")
        )
    options = dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"unknown {field} {name!r}; choose one of {sorted(table)}")
    stage = table[name]
    known = list(inspect.signature(stage).parameters)
    unknown = {option: value for option, value in options.items() if option not in known}
    if unknown:
        raise ValueError(f"{field} {name!r} does not take {unknown}; its options are {known}")
    return stage(**options)


def describe_stage(spec: Any, table: Mapping[str, type]) -> Any:
    """The inverse of `build_stage` where there is one; `table` also names the stages inside it."""
    if isinstance(spec, Mapping):
        return dict(spec)
    if isinstance(spec, list | tuple):
        return [describe_stage(one, table) for one in spec]
    for name, stage in table.items():
        if type(spec) is stage and dataclasses.is_dataclass(spec):
            options = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.init}
            return {"name": name} | {option: describe_stage(value, table) for option, value in options.items()}
    return spec


def summarize_stage(stage: Stage, table: dict[str, type]) -> str:
    """`"name(option=value)"`, with the options that are not the defaults."""
    described = describe_stage(stage, table)
    if not isinstance(described, dict):
        return stage.stage_name
    defaults = {
        field.name: describe_stage(
            field.default if field.default_factory is dataclasses.MISSING else field.default_factory(), table
        )
        for field in dataclasses.fields(stage)
    }
    options = {name: value for name, value in described.items() if name != "name" and value != defaults[name]}
    return described["name"] + (
        f"({', '.join(f'{name}={value!r}' for name, value in options.items())})" * bool(options)
    )
