"""What is put on a model for its caches, until nobody needs it any more; knows neither models nor caches."""

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from .attention import forget_hidden_states


@dataclass(eq=False)
class Hold:
    """Something that was put in place, until the last of its holders lets go.

    Args:
        take_away: undoes it, given what it was put on.
        holders: who needs it; those that are gone need nothing.
    """

    take_away: Callable[[Any], None]
    holders: "weakref.WeakSet[Any]" = field(default_factory=weakref.WeakSet)


_holds: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a config or module to what was put on it, by kind
_holds_lock = threading.RLock()


def hold(thing: Any, kind: str, put: Callable[[Any], Callable[[Any], None]], holder: Any) -> None:
    """Hold something of a kind on a config or module: `put` there now, if it is not, it gives what takes it away."""
    with _holds_lock:
        holds = _holds.setdefault(thing, {})
        if kind not in holds:
            holds[kind] = Hold(put(thing))
        holds[kind].holders.add(holder)


def let_go(holder: Any) -> None:
    """Take away what nobody else holds."""
    with _holds_lock:
        for thing, holds in list(_holds.items()):
            for kind, one in list(holds.items()):
                one.holders.discard(holder)
                if not one.holders:
                    one.take_away(thing)
                    del holds[kind]
            if not holds:
                _holds.pop(thing, None)


def hold_also(holder: Any, other: Any) -> None:
    """Have another one hold what a holder does."""
    with _holds_lock:
        for holds in list(_holds.values()):
            for one in holds.values():
                if holder in one.holders:
                    one.holders.add(other)


class OwnHook:
    """A hook of ours: in what is copied or saved of its module it does nothing."""

    def __init__(self, hook: Callable[..., None] | None = None) -> None:
        self.hook = hook

    def __call__(self, *given: Any) -> None:
        if self.hook is not None:
            self.hook(*given)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OwnHook":
        return OwnHook()

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnHook, ()


def removal_of(hooks: Iterable[RemovableHandle]) -> Callable[[torch.nn.Module], None]:
    """What removes hooks."""
    hooks = list(hooks)

    def remove(module: torch.nn.Module) -> None:
        for hook in hooks:
            hook.remove()
        forget_hidden_states()

    return remove
