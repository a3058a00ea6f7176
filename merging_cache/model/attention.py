"""The registered attention: hands a model's queries to the cache's layers, and fits masks to what a layer stores.

A cache is told keys and values only. The rest comes through transformers' own extension point, a registered attention
function with its mask function: while a model is linked (see `link.py`) it runs `merging_<implementation>`, which calls
the implementation it stands for and then tells the layer, found by a mark on the keys that its `update` returned. For
any other cache it is a pass-through. Knows transformers, and of layers only that they have `attended`.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "merging_"
TILE = 1 << 22  # attention weights that are held at a time where they are shown

# .waiting: the pass this thread's last update announced; .hidden_states: the last module's input; .probe: see `probing`
_thread = threading.local()


class LinkedName(str):
    """The name of an attention implementation that runs linked: it is looked up as `merging_<name>`.

    Whatever else is done with it, it is the name itself: model files compare it with others and take another branch for
    some, and what is saved, pickled or copied is not linked.
    """

    __slots__ = ()

    @property
    def linked(self) -> str:
        """Under which name it is registered."""
        return PREFIX + str(self)

    def __hash__(self) -> int:
        return hash(self.linked)

    def __eq__(self, other: object) -> bool:
        return str(self) == other or self.linked == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


# One pass -------------------------------------------------------------------------------------------------------------


@dataclass
class Pass:
    """One update on its way to attention: the mark on the keys it returned.

    Args:
        layer: the layer, whose `attended` is called once the attention is done, or `None` once it was.
        layer_idx: its index.
        length: L, how many keys the update returned.
        num_slots: how many of them, the first ones, are folded slots that every new token may see, whatever the mask
            says of its first columns; 0 where the mask is right as it comes.
        bias: `[B, H, num_slots]`, what is added to the attention logits of the slots (a very negative number where a
            head has none), or `None` for nothing.
        shows_weights: whether the layer is to be shown the attention's weights. Then its `watch` is called before, with
            the keys of the attention and its input, and what that returns for some of the queries at a time, with their
            weights `[B, Hq, m, L]`, what they read `[B, Hq, m, D]`, and the slice that says which queries these are.
    """

    layer: Any
    layer_idx: int
    length: int
    num_slots: int = 0
    bias: Tensor | None = None
    shows_weights: bool = False

    def announce(self, keys: Tensor) -> None:
        """Mark `keys`, so that the attention that is handed them finds this."""
        keys._merging_pass = self
        # some models compute other keys from what update returns, and the mark is lost
        _thread.waiting = weakref.ref(self)

    def tell(self, **attended: Any) -> None:
        """Tell the layer what its attention was given, the first time only.

        Its keys may be shared with another layer's attention, which has other queries.
        """
        if self.layer is not None:
            layer, self.layer = self.layer, None
            layer.attended(**attended)

    def mask(self, attention_mask: Any, query: Tensor, length: int) -> Tensor | None:
        """The mask for this layer, `[B or 1, 1 or Hq, q, length]`, added to logits; or the one given, where that fits.

        transformers makes one mask for all layers, by the number of keys of the first. What it says of the newest
        keys is taken from there; slots are older than any query, so each query sees every slot there is.
        """
        if self.shows_weights and not self.num_slots:
            return _recent_mask(attention_mask, query, length)
        if not self.num_slots or (self.bias is None and attention_mask is None):
            return attention_mask
        batch, query_heads, num_queries = query.shape[:3]
        recent = _recent_mask(attention_mask, query, length - self.num_slots)
        if self.bias is None:
            bias = query.new_zeros((1, 1, 1, self.num_slots))
        else:
            groups = query_heads // self.bias.shape[1]
            bias = self.bias.to(query.dtype).repeat_interleave(groups, dim=1).unsqueeze(2)
        heads = max(bias.shape[1], recent.shape[1])
        bias = bias.expand(batch, heads, num_queries, -1)
        return torch.cat([bias, recent.expand(batch, heads, num_queries, -1)], dim=-1)


def _recent_mask(attention_mask: Any, query: Tensor, length: int) -> Tensor:
    """What a mask of any kind says of the last `length` keys, as `[B or 1, 1 or Hq, q, length]` added to logits."""
    num_queries, device = query.shape[2], query.device
    causal = torch.arange(length, device=device) <= torch.arange(num_queries, device=device).unsqueeze(1) + (
        length - num_queries
    )
    if attention_mask is None:
        seen = causal[None, None]
    elif not isinstance(attention_mask, Tensor):  # flex attention's block mask: causal but for padding
        seen = causal & _block_mask_row(attention_mask)[:, None, None, -length:]
    elif attention_mask.dim() == 2:  # flash attention's: padding only
        seen = causal & attention_mask[:, None, None, -length:].bool()
    elif attention_mask.dtype == torch.bool:
        seen = attention_mask[..., -length:]
    else:
        return attention_mask[..., -length:].to(query.dtype)
    least = torch.finfo(query.dtype).min
    return torch.zeros(seen.shape, dtype=query.dtype, device=device).masked_fill_(~seen, least)


def visible_to_last(attention_mask: Any) -> Tensor | None:
    """`[B, L]` bool, the keys that the last query of a pass may see: all but padding. `None` where it may see all."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        return _block_mask_row(attention_mask)
    if attention_mask.dim() == 2:
        return attention_mask.bool()
    row = attention_mask[:, 0, -1]  # one for all rows of the batch, or one each
    return row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2


def _block_mask_row(block_mask: Any) -> Tensor:
    """`[B, L]` bool, the last row of a flex attention block mask."""
    from torch.nn.attention.flex_attention import create_mask

    batch, _, num_queries, length = block_mask.shape
    last = torch.tensor(num_queries - 1)

    def row(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return block_mask.mask_mod(b, h, last.to(k.device), k)

    return create_mask(row, batch, 1, 1, length, device=str(block_mask.kv_indices.device))[:, 0, 0]


# The registered attention ---------------------------------------------------------------------------------------------


def register(implementation: str) -> LinkedName:
    """Register the linked version of an attention implementation with its mask; returns its name.

    Raises:
        ValueError: if transformers has no mask function for it.
    """
    implementation = str(implementation)
    name = LinkedName(implementation)
    if name.linked in ALL_ATTENTION_FUNCTIONS:
        return name
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attention implementation {implementation!r} has no registered mask function, so it cannot be linked; "
            'use model.set_attn_implementation("sdpa") or another of transformers\' own'
        )

    def linked_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        hidden_states = _take_hidden_states(module)
        if (probe := getattr(_thread, "probe", None)) is not None:
            probe.append(query)
        announced = find_pass(module, key)
        if announced is None:
            return _run(implementation, module, query, key, value, attention_mask, *args, **kwargs)
        mask = announced.mask(attention_mask, query, key.shape[2])
        if announced.shows_weights:
            layer, announced.layer = announced.layer, None  # or the keys would keep it, and it the keys
            shown = layer.watch(key=key, hidden_states=hidden_states)
            return _show_weights(shown, module, query, key, value, mask, *args, **kwargs)
        run_as = implementation if mask is attention_mask else _for_mask(implementation, kwargs)
        output = _run(run_as, module, query, key, value, mask, *args, **kwargs)
        announced.tell(
            query=query,
            key=key,
            value=value,
            visible=visible_to_last(attention_mask),
            module=module,
            scaling=kwargs.get("scaling"),
            hidden_states=hidden_states,
        )
        return output

    AttentionInterface.register(name.linked, linked_attention)
    AttentionMaskInterface.register(name.linked, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def find_pass(module: torch.nn.Module, key: Tensor) -> Pass | None:
    """The pass that these keys come from, by their mark, or else the one that waits for just this attention."""
    announced = getattr(key, "_merging_pass", None)
    waiting, _thread.waiting = getattr(_thread, "waiting", None), None
    if announced is None and waiting is not None and (announced := waiting()) is not None:
        fits = key.dim() == 4 and key.shape[2] == announced.length
        if not fits or getattr(module, "layer_idx", announced.layer_idx) != announced.layer_idx:
            announced = None
    return announced


def _run(implementation: str, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Call the attention that the module would call under this implementation."""
    interface = from_model_file(module, "ALL_ATTENTION_FUNCTIONS") or ALL_ATTENTION_FUNCTIONS
    if implementation == "eager":
        return eager_attention(module)(module, *args, **kwargs)
    if "flash" in implementation:
        # it loads its kernels by the name in the config
        config = _Overlay(module.config, _attn_implementation=implementation)
        module = _Overlay(module, config=config)
    return interface[implementation](module, *args, **kwargs)


def eager_attention(module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """The eager attention of the file that the module is written in, which gives its weights, too."""
    eager = from_model_file(module, "eager_attention_forward")
    if eager is None:
        raise ValueError(
            f"the file of {type(module).__name__} has no eager_attention_forward, so its attention weights cannot be "
            "seen; use sdpa, and a scorer and a budget that read nothing again, such as 'keydiff' and 'adakv'"
        )
    return eager


def _show_weights(
    shown: Callable[[Tensor, Tensor, slice], None],
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The module's eager attention, some queries at a time, whose weights are `shown` and not kept."""
    eager = eager_attention(module)
    groups, num_queries = query.shape[1] // key.shape[1], query.shape[2]
    if groups > 1:  # once for all of them
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        module = _Overlay(module, num_key_value_groups=1)
    step = max(1, TILE // (query.shape[0] * query.shape[1] * key.shape[2]))
    outputs = []
    for first in range(0, num_queries, step):
        part = slice(first, min(first + step, num_queries))
        mine = {name: _of_queries(one, part, num_queries) for name, one in kwargs.items()}
        output, weights = eager(module, query[:, :, part], key, value, mask[:, :, part], *args, **mine)
        shown(weights, output.transpose(1, 2), part)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


def _of_queries(argument: Any, part: slice, num_queries: int) -> Any:
    """Of what a module adds to its logits the rows of these queries; anything else as it is."""
    is_bias = isinstance(argument, Tensor) and argument.dim() == 4 and argument.shape[2] == num_queries
    return argument[:, :, part] if is_bias else argument


def _for_mask(implementation: str, kwargs: dict[str, Any]) -> str:
    """The implementation for a mask of our own, that adds to the logits of each head."""
    # flash attention takes no such mask, flex attention the same one for all heads; what users have registered does
    if "flash" not in implementation and "flex" not in implementation:
        return implementation
    capped = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    return "eager" if capped else "sdpa"


def from_model_file(module: torch.nn.Module, name: str) -> Any:
    """A function of the file that the module's class is written in, or one of its parents' files."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), name, None)
        if found is not None:
            return found
    return None


class _Overlay:
    """An object as it is, except for some attributes."""

    def __init__(self, wrapped: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes, _wrapped=wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_wrapped"], name)


# What modules are asked besides ---------------------------------------------------------------------------------------


def keep_hidden_states(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before an attention module that keeps its input for the attention function."""
    _thread.hidden_states = (module, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def _take_hidden_states(module: torch.nn.Module) -> Tensor | None:
    kept, _thread.hidden_states = getattr(_thread, "hidden_states", None), None
    return kept[1] if kept is not None and kept[0] is module else None


def forget_hidden_states() -> None:
    """Let go of what `keep_hidden_states` kept in this thread."""
    _thread.hidden_states = None


@contextmanager
def probing() -> Iterator[list[Tensor]]:
    """Collect the queries that linked attention is given in this thread."""
    _thread.probe = []
    try:
        yield _thread.probe
    finally:
        _thread.probe = None
