"""The attention link: hands a model's queries to the cache's layers, and fits attention masks to what a layer stores.

A cache is told keys and values only. The rest comes through transformers' own extension point, a registered attention
function with its mask function: while a model is linked it runs `merging_<implementation>`, which calls the
implementation it stands for and then tells the layer, found by a mark on the keys that its `update` returned. For any
other cache it is a pass-through. Knows transformers, and of layers only that they have `attended`.
"""

import functools
import inspect
import re
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "merging_"

_links: WeakIdKeyDictionary = WeakIdKeyDictionary()  # the config of a linked model's decoder to its ModelLink
_links_lock = threading.RLock()
# .waiting: the pass this thread's last update announced; .hidden_states: the last module's input; .probe: see `probing`
_thread = threading.local()


# What a cache holds ---------------------------------------------------------------------------------------------------


class Link:
    """A cache's side of the link: which model it belongs to, if it was told, and whether that model is linked.

    Args:
        model: the model, or `None` where the cache knows its config only.
        config: the model's config, or `None`.
        needed: whether some stage cannot do without the link.
        cache_name: the cache's class, for messages.
        needs_hidden_states: whether some stage wants the input of the attention.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        config: PreTrainedConfig | None,
        needed: bool,
        cache_name: str,
        needs_hidden_states: bool = False,
    ) -> None:
        self.needed = needed
        self.cache_name = cache_name
        self.model_name = "the model" if config is None else type(config).__name__.removesuffix("Config")
        if config is not None and getattr(config, "architectures", None):
            self.model_name = config.architectures[0]
        self._config = None if config is None else config.get_text_config(decoder=True)
        self._reading: weakref.ref[Any] | None = None
        self._model_link: ModelLink | None = None
        if model is None:
            return
        self.model_name = type(model).__name__
        if can_link(model):
            self._model_link = ModelLink.of(model, self, needs_hidden_states)
        elif needed:
            raise ValueError(
                f"the attention of {self.model_name} does not go through transformers' attention interface, so neither "
                "its queries nor the masks of its layers can be reached; choose a scorer, budget and merger that need "
                "keys and values only (such as scorer='keydiff', budget='uniform')"
            )

    @property
    def expected(self) -> bool:
        """Whether layers should wait for the attention of their passes."""
        return self.needed or self._model_link is not None

    @property
    def is_broken(self) -> bool:
        """Whether the model is known not to be linked (any more)."""
        return self._config is not None and not is_linked(self._config)

    def reads(self, layer: Any) -> Any:
        """Note that the attention of this pass is to read the slots of `layer`; returns the layer before it."""
        before, self._reading = self._reading, weakref.ref(layer)
        return None if before is None else before()

    def release(self, model: PreTrainedModel | None) -> None:
        """Put the model back as it was before it was linked, unless another cache or a `with` block still needs it.

        Raises:
            ValueError: if the cache is linked to another model than `model`.
        """
        if self._model_link is None:
            return
        if model is not None and decoder_config(model) is not self._config:
            raise ValueError(
                f"this cache is linked to a {self.model_name}, not to the {type(model).__name__} given; call "
                "cache.release() without a model, or with its own"
            )
        self._model_link.let_go(self)
        self._model_link = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Link":
        twin = object.__new__(Link)  # a copy of a cache belongs to the same model, and has to be released by itself
        vars(twin).update(vars(self) | {"_reading": None})
        if self._model_link is not None:
            self._model_link.hold(twin)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled_link, (self.model_name, self.needed, self.cache_name)  # models do not travel with caches


def _unpickled_link(model_name: str, needed: bool, cache_name: str) -> Link:
    link = Link(None, None, needed, cache_name)
    link.model_name = model_name
    return link


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
    """

    layer: Any
    layer_idx: int
    length: int
    num_slots: int = 0
    bias: Tensor | None = None

    def announce(self, keys: Tensor) -> None:
        """Mark `keys`, so that the attention that is handed them finds this."""
        keys._merging_pass = self
        # some models compute other keys from what update returns, and the mark is lost
        _thread.waiting = weakref.ref(self)

    def mask(self, attention_mask: Any, query: Tensor, length: int) -> Tensor | None:
        """The mask for this layer, `[B, 1 or Hq, q, length]`, added to logits; or the one given where it fits already.

        transformers makes one mask for all layers, by the number of keys of the first. What it says of the newest
        keys is taken from there; slots are older than any query, so each query sees every slot there is.
        """
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


def register(implementation: str) -> str:
    """Register the linked version of an attention implementation with its mask; returns its name.

    Raises:
        ValueError: if transformers has no mask function for it.
    """
    name = PREFIX + implementation.removeprefix(PREFIX)
    if name in ALL_ATTENTION_FUNCTIONS:
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
        run_as = implementation if mask is attention_mask else _for_mask(implementation, kwargs)
        output = _run(run_as, module, query, key, value, mask, *args, **kwargs)
        if announced.layer is not None:
            announced.layer.attended(
                query=query,
                key=key,
                value=value,
                visible=visible_to_last(attention_mask),
                module=module,
                scaling=kwargs.get("scaling"),
                hidden_states=hidden_states,
            )
            announced.layer = None  # keys may be shared with another layer's attention, which has other queries
        return output

    AttentionInterface.register(name, linked_attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
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
    eager = from_model_file(module, "eager_attention_forward")
    interface = from_model_file(module, "ALL_ATTENTION_FUNCTIONS") or ALL_ATTENTION_FUNCTIONS
    if implementation == "eager":
        if eager is None:
            raise ValueError(f"the file of {type(module).__name__} has no eager attention of its own; use sdpa")
        return eager(module, *args, **kwargs)
    if "flash" in implementation:
        # it loads its kernels by the name in the config
        config = _Overlay(module.config, _attn_implementation=implementation)
        module = _Overlay(module, config=config)
    return interface[implementation](module, *args, **kwargs)


def _for_mask(implementation: str, kwargs: dict[str, Any]) -> str:
    """The implementation for a mask of our own, that adds to the logits of each head."""
    if implementation in ("sdpa", "eager"):
        return implementation
    # flash attention takes no such mask, flex attention the same one for all heads
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


# A model's side of the link -------------------------------------------------------------------------------------------


def can_link(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through transformers' interface."""
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model is {type(model).__name__}; give a transformers model, such as AutoModelForCausalLM's")
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if any(_lists_implementations(sys.modules.get(type(part).__module__)) for part in parts):
        return False
    return any(part._can_set_attn_implementation() for part in parts)


@functools.cache
def _lists_implementations(file: ModuleType | None) -> bool:
    """Whether a model file does one thing for some implementations and another for all others (sparse indexers do)."""
    try:
        return re.search(r"_attn_implementation\s+(not\s+)?in\s*\(", inspect.getsource(file)) is not None
    except (OSError, TypeError):
        return False


@dataclass(eq=False)
class ModelLink:
    """A linked model and who needs the link.

    What the model was before is what its configs name without our prefix, so there is nothing to remember.
    """

    model: "weakref.ref[PreTrainedModel]"
    holders: "weakref.WeakSet[Any]" = field(default_factory=weakref.WeakSet)
    blocks: int = 0
    hidden_state_hooks: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel, holder: Link | None = None, hidden_states: bool = False) -> "ModelLink":
        """The link of this model, made now if there is none, held by a cache's link or else by a block.

        With `hidden_states` every attention module keeps its input for the attention function.
        """
        with _links_lock:
            link = _links.get(decoder_config(model))
            link = cls(weakref.ref(model)) if link is None or link.model() is None else link
            for config in configs_to_link(model):
                set_implementation(config, register(config._attn_implementation))
            _links[decoder_config(model)] = link
            if holder is None:
                link.blocks += 1
            else:
                link.hold(holder)
            if hidden_states:
                link.watch_hidden_states()
            return link

    def hold(self, holder: Link) -> None:
        """Keep the model linked for this cache; inside a `merging_attention` block the block decides."""
        with _links_lock:
            if not self.blocks:
                self.holders.add(holder)

    def let_go(self, holder: Link | None) -> None:
        """Put the model back if nobody else needs the link; `None` is a block that ends."""
        with _links_lock:
            if holder is None:
                self.blocks -= 1
            else:
                self.holders.discard(holder)
            model = self.model()
            if self.holders or self.blocks or model is None:
                return
            for hook in self.hidden_state_hooks:
                hook.remove()
            self.hidden_state_hooks.clear()
            _thread.hidden_states = None
            for config in configs_to_link(model):
                if is_linked(config):  # someone may have chosen another implementation since
                    set_implementation(config, config._attn_implementation.removeprefix(PREFIX))
            _links.pop(decoder_config(model), None)

    def watch_hidden_states(self) -> None:
        """Have every attention module keep its input for the attention function; removed with the link."""
        model = self.model()
        if self.hidden_state_hooks or model is None:
            return
        for module in model.modules():
            if getattr(module, "layer_idx", None) is not None and "Attention" in type(module).__name__:
                hook = module.register_forward_pre_hook(_keep_hidden_states, with_kwargs=True)
                self.hidden_state_hooks.append(hook)


def configs_to_link(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs by which the parts of a model choose their attention: the decoder's, and all that can be linked."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    configs = [part.config for part in parts if part._can_set_attn_implementation()]
    configs = [config for config in configs if config._attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS]
    return list({id(config): config for config in [*configs, decoder_config(model)]}.values())


def is_linked(config: PreTrainedConfig) -> bool:
    """Whether attention that chooses by this config runs linked."""
    return str(config._attn_implementation).startswith(PREFIX)


def set_implementation(config: PreTrainedConfig, name: str) -> None:
    """Have a config, but none inside it, name its attention implementation.

    `model.set_attn_implementation` would take every name with "flash" in it for kernels to load.
    """
    config._attn_implementation = {"": name}


def decoder_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the part of the model that generates text."""
    return model.config.get_text_config(decoder=True)


def _keep_hidden_states(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _thread.hidden_states = (module, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


def _take_hidden_states(module: torch.nn.Module) -> Tensor | None:
    kept, _thread.hidden_states = getattr(_thread, "hidden_states", None), None
    return kept[1] if kept is not None and kept[0] is module else None


def linked_model(module: torch.nn.Module) -> PreTrainedModel | None:
    """The linked model that this attention module belongs to."""
    for link in list(_links.values()):
        model = link.model()
        if model is not None and any(part is module for part in model.modules()):
            return model
    return None


@contextmanager
def probing() -> Iterator[list[Tensor]]:
    """Collect the queries that linked attention is given in this thread."""
    _thread.probe = []
    try:
        yield _thread.probe
    finally:
        _thread.probe = None


@contextmanager
def merging_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Link a model to merging caches for the length of a `with` block, and put it back afterwards.

    Inside, caches of this model see its queries and may differ in length between heads and layers, also those that were
    given its config only (scorers of hidden states need the model itself). Other caches are not affected: the same
    numbers come out, bit for bit.

    Args:
        model: a transformers model whose attention goes through the attention interface.

    Raises:
        ValueError: if it does not.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from merging_cache import MergingDynamicCache, merging_attention
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
        >>> with merging_attention(model):
        ...     cache = MergingDynamicCache(config=model.config, scorer="snapkv", compression_ratio=0.5)
        ...     _ = model.generate(torch.arange(1, 65)[None], past_key_values=cache, max_new_tokens=2, pad_token_id=0)
        >>> cache.report().total.slots, model.config._attn_implementation
        (66, 'sdpa')
    """
    if not can_link(model):
        raise ValueError(
            f"the attention of {type(model).__name__} does not go through transformers' attention interface, so it "
            "cannot be linked"
        )
    link = ModelLink.of(model)
    try:
        yield model
    finally:
        link.let_go(None)
