"""The link between a cache and its model: which models run the registered attention, for whom, and until when.

A linked model's configs name its attention implementation with our prefix; nothing else in it changes. Knows
transformers, and nothing of layers.
"""

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .attention import LinkedName, forget_hidden_states, keep_hidden_states, register
from .parallel import summed, tensor_parallel_group

_links: WeakIdKeyDictionary = WeakIdKeyDictionary()  # the config of a linked model's decoder to its ModelLink
_links_lock = threading.RLock()
_memories: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a model to what its caches have found out about it


def forget(model: torch.nn.Module) -> None:
    """Forget what a model's prompts have taught its caches, after its weights were changed, say.

    By default (`scorer="probe"`, `budget="profile"`) the first prompt of a model teaches its caches which of its tokens
    matter. Caches that are in use keep to what they know until they are reset.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from merging_cache import forget
        >>> forget(LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1)))
    """
    _memories.pop(model, None)


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
        self.was_given_model = model is not None
        self.cache_name = cache_name
        self.model_name = "the model" if config is None else type(config).__name__.removesuffix("Config")
        if config is not None and getattr(config, "architectures", None):
            self.model_name = config.architectures[0]
        self._config = None if config is None else config.get_text_config(decoder=True)
        self._reading: weakref.ref[Any] | None = None
        self._model_link: ModelLink | None = None
        self._model: Callable[[], PreTrainedModel | None] = _no_model
        if model is None:
            return
        self._model = weakref.ref(model)
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

    def watch_hidden_states(self) -> None:
        """Have the attention of a linked model hand over its input, too; for as long as it is linked."""
        if (model := self.model) is not None:
            self._model_link.watch_hidden_states(model)

    def watch_passes(self) -> None:
        """Have the decoder of a linked model tell its caches of every pass, before and after; while it is linked."""
        if (model := self.model) is not None:
            self._model_link.watch_passes(model)

    @property
    def model(self) -> PreTrainedModel | None:
        """The linked model; `None` where it is not linked."""
        return None if self._model_link is None else self._model()

    @property
    def memory(self) -> dict[str, Any]:
        """What caches have found out about the linked model, for later ones."""
        return {} if self.model is None else _memories.setdefault(self.model, {})

    @property
    def decoder(self) -> torch.nn.Module | None:
        """The part of the linked model that has layers; `None` where it is not linked."""
        return None if self.model is None else self.model.get_decoder()

    def summed(self, tensor: Tensor) -> Tensor:
        """What the processes that share the heads of each layer hold, added up."""
        return summed(tensor, tensor_parallel_group(self.model))

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


def _no_model() -> None:
    """What a link without a model refers to."""


def _unpickled_link(model_name: str, needed: bool, cache_name: str) -> Link:
    link = Link(None, None, needed, cache_name)
    link.model_name = model_name
    return link


# A model's side of the link -------------------------------------------------------------------------------------------


def can_link(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through transformers' interface."""
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model is {type(model).__name__}; give a transformers model, such as AutoModelForCausalLM's")
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return any(part._can_set_attn_implementation() for part in parts)


@dataclass(eq=False)
class ModelLink:
    """A linked model and who needs the link.

    What the model was before is what its configs name without our prefix, so there is nothing to remember.
    """

    model: "weakref.ref[PreTrainedModel]"
    holders: "weakref.WeakSet[Any]" = field(default_factory=weakref.WeakSet)
    blocks: int = 0
    hooks: list[Any] = field(default_factory=list)
    # models may share a config
    shows_hidden_states: "weakref.WeakSet[PreTrainedModel]" = field(default_factory=weakref.WeakSet)
    shows_passes: "weakref.WeakSet[PreTrainedModel]" = field(default_factory=weakref.WeakSet)

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
                link.watch_hidden_states(model)
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
            for hook in self.hooks:
                hook.remove()
            for kept in (self.hooks, self.shows_hidden_states, self.shows_passes):
                kept.clear()
            forget_hidden_states()
            for config in configs_to_link(model):
                if is_linked(config):  # someone may have chosen another implementation since
                    set_implementation(config, str(config._attn_implementation))
            _links.pop(decoder_config(model), None)

    def watch_hidden_states(self, model: PreTrainedModel) -> None:
        """Have every attention module keep its input for the attention function; removed with the link."""
        if model in self.shows_hidden_states:
            return
        self.shows_hidden_states.add(model)
        for module in model.modules():
            if getattr(module, "layer_idx", None) is not None and "Attention" in type(module).__name__:
                hook = module.register_forward_pre_hook(keep_hidden_states, with_kwargs=True)
                self.hooks.append(hook)

    def watch_passes(self, model: PreTrainedModel) -> None:
        """Have the decoder tell the cache of every pass; removed with the link."""
        if model in self.shows_passes:
            return
        self.shows_passes.add(model)
        decoder = model.get_decoder()
        self.hooks += [
            decoder.register_forward_pre_hook(_before_pass, with_kwargs=True),
            decoder.register_forward_hook(_after_pass, with_kwargs=True),
        ]


@functools.cache
def _signature(kind: type[torch.nn.Module]) -> inspect.Signature:
    """Of the forward of a class of modules; asked for in every step."""
    return inspect.signature(kind.forward)


def _given(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The cache that a decoder was given, and all its arguments by name."""
    given = _signature(type(decoder)).bind_partial(decoder, *args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    return given.get("cache", given.get("past_key_values")), given


def _before_pass(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache, given = _given(decoder, args, kwargs)
    if hasattr(cache, "before_pass"):
        cache.before_pass(given)


def _after_pass(decoder: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache, given = _given(decoder, args, kwargs)
    if hasattr(cache, "after_pass"):
        cache.after_pass(given)


def configs_to_link(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs by which the parts of a model choose their attention: the decoder's, and all that can be linked."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    configs = [part.config for part in parts if part._can_set_attn_implementation()]
    configs = [config for config in configs if config._attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS]
    return list({id(config): config for config in [*configs, decoder_config(model)]}.values())


def is_linked(config: PreTrainedConfig) -> bool:
    """Whether attention that chooses by this config runs linked."""
    return isinstance(config._attn_implementation, LinkedName)


def set_implementation(config: PreTrainedConfig, name: str) -> None:
    """Have a config, but none inside it, name its attention implementation.

    `model.set_attn_implementation` would take every name with "flash" in it for kernels to load.
    """
    config._attn_implementation = {"": name}


def decoder_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the part of the model that generates text."""
    return model.config.get_text_config(decoder=True)


def linked_model(module: torch.nn.Module) -> PreTrainedModel | None:
    """The linked model that this attention module belongs to."""
    for link in list(_links.values()):
        model = link.model()
        if model is not None and any(part is module for part in model.modules()):
            return model
    return None


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
