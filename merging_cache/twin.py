"""A twin of a module, for what a cache finds out in the middle of a user's pass: it computes the same, unnoticed.

Knows torch, and by name the libraries whose hooks belong to what a module computes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

# whose hooks bring a module its weights and its inputs, from other devices or processes
WIRING = ("accelerate", "deepspeed", "torch.distributed", "transformers.distributed", "transformers.integrations")
# whose hooks tell attention functions their input, and adapters which rows are theirs
OWN, OF_ROWS = __package__, "peft"


def twin_of(module: torch.nn.Module, hooks_of: Iterable[str] = WIRING) -> torch.nn.Module:
    """The same modules over the same weights, to be called once: nothing that watches the module takes notice of it.

    Its hooks are left out but for those of some libraries, and so is what others put in place of the class's `forward`;
    it is not in training, so draws no random numbers; and what it keeps of a call, it keeps to itself.

    Args:
        module: it may have its weights offloaded by accelerate.
        hooks_of: the packages whose hooks stay, and what they put in place of a `forward`.

    Example:
        >>> import torch
        >>> from merging_cache.twin import twin_of
        >>> linear = torch.nn.Linear(4, 4)
        >>> _ = linear.register_forward_hook(lambda module, args, output: print("seen"))
        >>> torch.equal(twin_of(linear)(torch.zeros(1, 4))[0], linear.bias)
        True
    """
    twins: dict[int, torch.nn.Module] = {}  # modules that are there twice stay one
    return _twin(module, tuple(hooks_of), twins)


def lacks_weights(module: torch.nn.Module) -> bool:
    """Whether some of its weights are elsewhere, and nothing brings them: torch computes with whatever is in memory."""
    return any(
        any(parameter.is_meta for parameter in part.parameters(recurse=False)) and not hasattr(part, "_hf_hook")
        for part in module.modules()
    )


def matrix_of(layer: torch.nn.Module, like: torch.Tensor) -> torch.Tensor | None:
    """`[width, n]` in fp32, what a linear layer multiplies by, whatever it is made of.

    `None` for a layer that is no linear one, or that raises when it is tried out.

    A plain layer's weight says it; of others (quantized, offloaded, with active adapters) it is what they make of unit
    vectors.

    Args:
        layer: with a bias or without.
        like: a tensor of the kind and on the device that it computes with.
    """
    weight = getattr(layer, "weight", None)
    width = getattr(layer, "in_features", getattr(layer, "nx", None))  # the latter of transformers' Conv1D
    if width is None or lacks_weights(layer):
        return None
    if type(layer) is torch.nn.Linear and weight.is_floating_point() and not weight.is_meta:
        if hasattr(weight, "to_local"):  # what this process has of it, where several share the layer
            return weight.to_local().detach().float().mT
        if type(weight) is torch.nn.Parameter:
            return weight.detach().float().mT
    dtype = next((one.dtype for one in layer.parameters() if one.is_floating_point() and one.itemsize > 1), like.dtype)
    unit = torch.eye(1 + width, dtype=dtype, device=like.device)[:, 1:]  # first nothing, for the bias
    try:
        with torch.no_grad():
            made = twin_of(layer)(unit.unsqueeze(0))[0].float()
    except Exception:  # whatever it is made of
        return None
    return made[1:] - made[:1]


def _twin(module: torch.nn.Module, hooks_of: tuple[str, ...], twins: dict[int, torch.nn.Module]) -> torch.nn.Module:
    if id(module) in twins:
        return twins[id(module)]
    twin = twins[id(module)] = object.__new__(type(module))
    own = vars(twin)
    own.update(vars(module), training=False, _parameters=dict(module._parameters), _buffers=dict(module._buffers))
    own["_modules"] = {
        name: None if child is None else _twin(child, hooks_of, twins) for name, child in module._modules.items()
    }
    forward = own.pop("forward", None)
    if forward is None or "_hf_hook" in own or not _package_of(forward).startswith(hooks_of):
        forward = type(twin).forward.__get__(twin)
    # what torch calls in place of a forward and all hooks, those that were registered for every module included
    own["_compiled_call_impl"] = _call_of(twin, forward, hooks_of)
    return twin


def _call_of(twin: torch.nn.Module, forward: Callable[..., Any], hooks_of: tuple[str, ...]) -> Callable[..., Any]:
    """A forward between what some hooks, and accelerate, do before and after it."""
    wiring = vars(twin).get("_hf_hook")
    before, after = (
        [
            (hook, key in getattr(twin, f"{kind}_with_kwargs"))
            for key, hook in getattr(twin, kind).items()
            if _package_of(hook).startswith(hooks_of)
        ]
        for kind in ("_forward_pre_hooks", "_forward_hooks")
    )
    if wiring is None and not before and not after:
        return forward

    def call(*args: Any, **kwargs: Any) -> Any:
        for hook, takes_kwargs in before:
            given = hook(twin, args, kwargs) if takes_kwargs else hook(twin, args)
            if given is not None and takes_kwargs:
                args, kwargs = given
            elif given is not None:
                args = given if isinstance(given, tuple) else (given,)
        moved = (args, kwargs) if wiring is None else wiring.pre_forward(twin, *args, **kwargs)
        output = forward(*moved[0], **moved[1])
        output = output if wiring is None else wiring.post_forward(twin, output)
        for hook, takes_kwargs in after:
            changed = hook(twin, args, kwargs, output) if takes_kwargs else hook(twin, args, output)
            output = output if changed is None else changed
        return output

    return call


def _package_of(hook: Callable[..., Any]) -> str:
    """The module that a hook is written in."""
    while hasattr(hook, "func"):  # functools.partial
        hook = hook.func
    return getattr(hook, "__module__", None) or type(hook).__module__
