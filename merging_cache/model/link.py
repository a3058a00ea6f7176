"""The link between a cache and its model: which models run the registered attention, for whom, and until when.

A linked model's configs name its attention implementation by a name of ours; where a stage asks for it hooks are put on
its modules; nothing else in it changes. Each of these is there as long as someone holds it. Knows transformers, and
nothing of layers.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .attention import LinkedName, keep_hidden_states, register
from .holding import OwnHook, hold, hold_also, let_go, removal_of
from .parallel import summed, tensor_parallel_group

_memories: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a decoder to what its model's caches have found out about it
_linked: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()  # models that were linked, and their decoders
# the blocks that this thread of execution is in: the config of a decoder, and who holds it
_blocks: ContextVar[tuple[tuple[PreTrainedConfig, "Block"], ...]] = ContextVar("merging_attention", default=())


def forget(model: torch.nn.Module) -> None:
    """Forget what a model's prompts have taught its caches: after its weights were changed, or another adapter chosen.

    By default (`scorer="probe"`, `budget="profile"`) the first prompts of a model teach its caches which of its tokens
    matter. Caches that are in use keep to what they know until they are reset.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from merging_cache import forget
        >>> forget(LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1)))
    """
    _memories.pop(decoder_of(model), None)


# What is put in place -------------------------------------------------------------------------------------------------


def put_name(config: PreTrainedConfig) -> Callable[[PreTrainedConfig], None]:
    """Have attention that chooses by this config run linked."""
    set_implementation(config, register(config._attn_implementation))
    return take_name_away


def take_name_away(config: PreTrainedConfig) -> None:
    if is_linked(config):  # someone may have chosen another implementation since
        set_implementation(config, str(config._attn_implementation))


def put_input_hooks(model: torch.nn.Module) -> Callable[[torch.nn.Module], None]:
    """Have every attention module keep its input for the attention function."""
    return removal_of(
        module.register_forward_pre_hook(OwnHook(keep_hidden_states), with_kwargs=True)
        for module in model.modules()
        if getattr(module, "layer_idx", None) is not None and "Attention" in type(module).__name__
    )


def put_pass_hooks(decoder: torch.nn.Module) -> Callable[[torch.nn.Module], None]:
    """Have a decoder tell the cache of every pass, before and after."""
    return removal_of(
        [
            decoder.register_forward_pre_hook(OwnHook(_before_pass), with_kwargs=True),
            decoder.register_forward_hook(OwnHook(_after_pass), with_kwargs=True),
        ]
    )


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
        self._config = None if config is None else decoder_config(config)
        self._reading: weakref.ref[Any] | None = None
        self._model = self._decoder = _nothing
        self._block: Block | None = None  # that the cache was made in, which holds in its place
        self.is_linked = False
        if model is None:
            return
        self.model_name = type(model).__name__
        if can_link(model):
            self._model, self._decoder = weakref.ref(model), weakref.ref(decoder_of(model))
            blocks = (block for config, block in _blocks.get() if config is self._config and not block.is_over)
            self._block = next(blocks, None)
            self.is_linked = True
            link(model, self._holder)
            if needs_hidden_states:
                self.watch_hidden_states()
        elif needed:
            raise ValueError(
                f"the attention of {self.model_name} does not go through transformers' attention interface, so neither "
                "its queries nor the masks of its layers can be reached; choose a scorer, budget and merger that need "
                "keys and values only (such as scorer='keydiff', budget='uniform')"
            )

    @property
    def _holder(self) -> Any:
        return self if self._block is None else self._block

    @property
    def expected(self) -> bool:
        """Whether layers should wait for the attention of their passes."""
        return self.needed or self.is_linked

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
        if self.decoder is not None:
            hold(self.decoder, "inputs", put_input_hooks, self._holder)

    def watch_passes(self) -> None:
        """Have the decoder of a linked model tell its caches of every pass, before and after; while it is linked."""
        if self.decoder is not None:
            hold(self.decoder, "passes", put_pass_hooks, self._holder)

    @property
    def decoder(self) -> torch.nn.Module | None:
        """The part of the linked model that has layers; `None` where it is not linked."""
        return self._decoder() if self.is_linked else None

    @property
    def memory(self) -> dict[str, Any]:
        """What caches have found out about the linked model, for later ones."""
        return {} if self.decoder is None else _memories.setdefault(self.decoder, {})

    def summed(self, tensor: Tensor) -> Tensor:
        """What the processes that share the heads of each layer hold, added up."""
        return summed(tensor, tensor_parallel_group(self._model()))

    def release(self, model: PreTrainedModel | None) -> None:
        """Put the model back as it was before it was linked, unless another cache or a `with` block still needs it.

        Raises:
            ValueError: if the cache is linked to another model than `model`.
        """
        if not self.is_linked:
            return
        if model is not None and decoder_config(model.config) is not self._config:
            raise ValueError(
                f"this cache is linked to a {self.model_name}, not to the {type(model).__name__} given; call "
                "cache.release() without a model, or with its own"
            )
        self.is_linked = False
        let_go(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Link":
        twin = object.__new__(Link)  # a copy of a cache belongs to the same model, and has to be released by itself
        vars(twin).update(vars(self) | {"_reading": None})
        hold_also(self, twin)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled_link, (self.model_name, self.needed, self.cache_name)  # models do not travel with caches


def _nothing() -> None:
    """What a link without a model refers to."""


def _unpickled_link(model_name: str, needed: bool, cache_name: str) -> Link:
    link = Link(None, None, needed, cache_name)
    link.model_name = model_name
    return link


# A model --------------------------------------------------------------------------------------------------------------


def can_link(model: PreTrainedModel) -> bool:
    """Whether the model's attention goes through transformers' interface."""
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "set_attn_implementation"):
        raise TypeError(f"model is {type(model).__name__}; give a transformers model, such as AutoModelForCausalLM's")
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return any(part._can_set_attn_implementation() for part in parts)


def link(model: PreTrainedModel, holder: Any) -> None:
    """Link a model for a holder."""
    _linked.update((model, decoder_of(model)))
    for config in configs_to_link(model):
        hold(config, "name", put_name, holder)
        put_name(config)  # someone may have chosen another implementation since


def configs_to_link(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs by which the parts of a model choose their attention: the decoder's, and all that can be linked."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    configs = [part.config for part in parts if part._can_set_attn_implementation()]
    configs = [config for config in configs if config._attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS]
    return list({id(config): config for config in [*configs, decoder_config(model.config)]}.values())


def is_linked(config: PreTrainedConfig) -> bool:
    """Whether attention that chooses by this config runs linked."""
    return isinstance(config._attn_implementation, LinkedName)


def set_implementation(config: PreTrainedConfig, name: str) -> None:
    """Have a config, but none inside it, name its attention implementation.

    `model.set_attn_implementation` would take every name with "flash" in it for kernels to load.
    """
    config._attn_implementation = {"": name}


def decoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the part of a model that generates text: the very one, by which that part chooses its attention."""
    found = config.get_text_config(decoder=True)
    # of an encoder-decoder model that has one for both it is a copy, another one each time
    return found if found is config.get_text_config(decoder=True) else config


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The part of a model that has the layers which generate text, whatever is wrapped around it."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def linked_model(module: torch.nn.Module) -> torch.nn.Module | None:
    """The linked model that this attention module belongs to: of several the one around the others."""
    found = [model for model in _linked if any(part is module for part in model.modules())]
    return max(found, key=lambda model: sum(1 for _ in model.modules()), default=None)


@contextmanager
def merging_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Link a model to merging caches for the length of a `with` block, and put it back afterwards.

    Inside, caches of this model see its queries and may differ in length between heads and layers, also those that were
    given its config only (scorers of hidden states need the model itself). Other caches are not affected: the same
    numbers come out, bit for bit. What is made with `model=` inside is released with the block, unless by another
    thread, whose caches are released by themselves.

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
    block = Block()
    link(model, block)
    _blocks.set((*_blocks.get(), (decoder_config(model.config), block)))
    try:
        yield model
    finally:
        block.is_over = True  # it may end in another thread than it began in
        let_go(block)
        _blocks.set(tuple(one for one in _blocks.get() if not one[1].is_over))


@dataclass(eq=False)
class Block:
    """A `with` block, as a holder."""

    is_over: bool = False
