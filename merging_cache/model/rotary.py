"""The rotary position embedding of an attention layer, undone or averaged over positions, by the model's own functions.

A layer's queries are rotated by what the model's rotary module says of a position (cosines and sines) and by the
`apply_rotary_pos_emb` of the model's file, whatever its layout. Both are linear in cosine and sine, which is all that
is used here. Knows transformers' model files; scorers only know `Rotary`.
"""

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..twin import lacks_weights, twin_of
from .attention import from_model_file, probing
from .calling import cache_argument
from .link import linked_model
from .support import settings

CHANGING = ("dynamic", "longrope")  # frequencies that depend on the length of the sequence
ORDERS = (["cos", "sin"], ["sin", "cos"])  # in which rotary modules give them, and their models' functions take them
PROBED = (0, 1, 5, 42, 999, 30_011)  # far enough apart for slow channels to turn, too
UNEXPLAINED = 0.05  # of the spread over positions that the right way may leave, by rounding in half precision


# by attention module, which none of them keeps alive
_found: "WeakKeyDictionary[torch.nn.Module, Rotary]" = WeakKeyDictionary()


class NoRotaryError(ValueError):
    """A rotary embedding that could not be made out.

    Args:
        reason: whose, and why.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"{reason}, so its queries and keys cannot be rotated back; choose a scorer that does not need it, such as "
            "scorer='snapkv' or scorer='keydiff'"
        )


class Rotary:
    """Rotates `[..., D]` as an attention layer does.

    Args:
        embedding: the model's rotary module.
        options: what it has to be told beyond positions.
        apply: `(states [B, H, n, D], cosines, sines) -> [B, H, n, D]`, linear in cosines and sines.
        sines_first: whether the module gives sines before cosines.
    """

    def __init__(
        self,
        embedding: torch.nn.Module,
        options: dict[str, Any],
        apply: Callable[[Tensor, Tensor, Tensor], Tensor],
        sines_first: bool = False,
    ) -> None:
        self.embedding = embedding
        self._options = options
        self._apply = apply
        self._sines_first = sines_first

    def as_given(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What the rotary module says of positions `[B, n]`, in its order."""
        table = getattr(self.embedding, "embed_positions", None)  # a table ends where the model does
        positions = positions if table is None else positions.clamp_max(len(table) - 1)
        return twin_of(self.embedding)(torch.zeros(1, device=positions.device), positions, **self._options)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[B, n, width]` of positions `[B, n]`, in fp32."""
        first, second = (part.float().to(positions.device) for part in self.as_given(positions))
        return (second, first) if self._sines_first else (first, second)

    def rotated(self, states: Tensor, positions: Tensor) -> Tensor:
        """`[B, H, n, D]` as they are at `positions`, `[B, n]` or `[B, H, n]`."""
        return self._turned(states, positions, back=False)

    def unrotated(self, states: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotated`, in fp32."""
        return self._turned(states, positions, back=True)

    def mean_rotated(self, states: Tensor, first: int, count: int) -> Tensor:
        """`[..., D]` averaged over being at the positions `first` to `first + count - 1`, in fp32."""
        positions = torch.arange(first, first + count, device=states.device).unsqueeze(0)
        cos, sin = (part.mean(dim=1, keepdim=True) for part in self.cos_sin(positions))
        flat = states.float().reshape(1, -1, 1, states.shape[-1])
        return self._apply(flat, cos, sin).view(states.shape)

    def _turned(self, states: Tensor, positions: Tensor, back: bool) -> Tensor:
        flat = states.float()
        if positions.dim() == 3:
            flat, positions = flat.flatten(0, 1).unsqueeze(1), positions.flatten(0, 1)
        cos, sin = self.cos_sin(positions)
        if back:  # cosines and sines may be scaled, as YaRN does
            squared = cos.square() + sin.square()
            cos, sin = cos / squared, -sin / squared
        return self._apply(flat, cos, sin).view(states.shape)


def rotary_of(module: torch.nn.Module, like: Tensor) -> Rotary:
    """The rotary embedding of an attention module of a linked model, found once for each module.

    It is tried out: a twin of the module attends to one and the same token at several positions, and the queries that
    it makes of it, rotated back, have to be one and the same query.

    Args:
        module: the attention module.
        like: a tensor of the kind and on the device that it computes with, such as its queries.

    Raises:
        NoRotaryError: if the module has none, or one that cannot be undone so.
    """
    if module not in _found:
        _found[module] = _find(module, like)
    return _found[module]


@torch.no_grad()
def _find(module: torch.nn.Module, like: Tensor) -> Rotary:
    model = linked_model(module)
    name = type(module).__name__

    def refusal(why: str) -> NoRotaryError:
        return NoRotaryError(f"the rotary position embedding of {name} could not be made out ({why})")

    embedding = _embedding(model, module)
    apply = from_model_file(module, "apply_rotary_pos_emb")
    takes = [] if apply is None else list(inspect.signature(apply).parameters)
    pairs = takes[2:4] in ORDERS  # queries and keys at once, or one of them
    order = takes[2:4] if pairs else takes[1:3]
    if embedding is None or order not in ORDERS:
        raise refusal("it has none, or one that is not made of cosines and sines")
    types = getattr(embedding, "rope_type", "default")
    if any(kind in CHANGING for kind in (types.values() if isinstance(types, dict) else [types])):
        raise refusal("its frequencies change with the length of the text")
    if getattr(getattr(model, "config", None), "vision_config", None) is not None and _has_sections(module.config):
        raise refusal("tokens of an image have several positions, of which a cache is not told")
    if lacks_weights(module):
        raise refusal("some of its weights are elsewhere, so it cannot be tried out")
    options, sines_first = _layer_type(embedding, module), order[0] == "sin"

    def turned(states: Tensor, cos: Tensor, sin: Tensor, heads: int = 1) -> Tensor:
        angles = (sin, cos) if sines_first else (cos, sin)
        # what else is to be turned, if there has to be something, is one head: that is soon done
        return apply(states, states.narrow(heads, 0, 1), *angles)[0] if pairs else apply(states, *angles)

    def turned_tokens_first(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turned(states.transpose(1, 2), cos, sin, heads=2).transpose(1, 2)

    def not_at_all(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return states  # some layers of some models leave positions to the others

    try:
        as_given = Rotary(embedding, options, not_at_all, sines_first).as_given
        positions = torch.tensor([PROBED], device=like.device)
        queries = _probe(module, positions, as_given(positions), like.dtype)
    except Exception as error:
        raise refusal(f"trying it out raised {type(error).__name__}: {error}") from error
    usual = (not_at_all, turned, _first_part(turned, 1))
    others = (turned_tokens_first, *(_first_part(whole, 2) for whole in (turned, turned_tokens_first)))
    for ways in (usual, others):
        left_over = {}
        for way in ways:
            rotary = Rotary(embedding, options, way, sines_first)
            try:
                left_over[rotary] = _spread(rotary.unrotated(queries, positions))
            except (RuntimeError, IndexError):  # widths that do not fit
                continue
        best = min(left_over, key=left_over.get, default=None)
        if best is not None and left_over[best] <= UNEXPLAINED:
            return best
    raise refusal("rotating back does not give one query for one token")


def _first_part(whole: Callable[..., Tensor], channels_per_angle: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Rotates as many of the first channels as there are angles for, and leaves the others."""

    def first_part(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = channels_per_angle * cos.shape[-1]
        return torch.cat([whole(states[..., :width], cos, sin), states[..., width:]], dim=-1)

    return first_part


def _spread(queries: Tensor) -> float:
    """How much of queries `[1, Hq, n, D]` differs between the n positions: 0 for nothing, 1 for all; mean of channels.

    Channels count alike, or in half precision the rounding of one large channel would hide the turning of all others.
    """
    deviation = (queries - queries.mean(dim=2, keepdim=True)).norm(dim=2)
    return (deviation / queries.norm(dim=2).clamp_min(torch.finfo(queries.dtype).tiny)).mean().item()


def _has_sections(config: Any) -> bool:
    """Whether channels turn with different coordinates of a position (mRoPE)."""
    parameters = [*settings(config, "rope_parameters"), *settings(config, "rope_scaling")]
    return any("mrope_section" in (one or ()) for one in parameters)


def _embedding(model: torch.nn.Module | None, module: torch.nn.Module) -> Any:
    """The rotary module that serves an attention module: its own, or that of the innermost part that holds both."""
    found = None
    for part in (module,) if model is None else (*model.modules(), module):
        children = {name: child for name, child in part.named_children() if "Rotary" in type(child).__name__}
        if children and any(inner is module for inner in part.modules()):
            found = children.get("rotary_emb") or next(iter(children.values()))
    return found


def _layer_type(embedding: torch.nn.Module, module: torch.nn.Module) -> dict[str, str]:
    """What a rotary module that serves several kinds of layers has to be told."""
    if "layer_type" not in inspect.signature(embedding.forward).parameters:
        return {}
    return {"layer_type": getattr(module, "layer_type", None) or module.config.layer_types[module.layer_idx]}


def _probe(module: torch.nn.Module, positions: Tensor, angles: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The queries `[1, Hq, n, D]` that a module makes of one token at several positions."""
    generator = torch.Generator().manual_seed(0)
    token = torch.randn(_input_width(module), generator=generator).to(positions.device, dtype)
    given = {
        "hidden_states": token.expand(1, positions.shape[1], -1),
        "position_embeddings": tuple(part.to(dtype) for part in angles),
        "position_ids": positions,
        "attention_mask": None,
        **cache_argument(None),
        "shared_kv_states": {},
        "use_cache": False,
    }
    takes = inspect.signature(module.forward).parameters
    with probing() as queries:
        twin_of(module)(**{name: value for name, value in given.items() if name in takes})
    return queries[-1]


def _input_width(module: torch.nn.Module) -> int:
    """The width of the hidden states that a module takes."""
    for name in ("q_proj", "qkv_proj", "query_key_value", "Wqkv", "q_a_proj"):
        if hasattr(getattr(module, name, None), "in_features"):
            return getattr(module, name).in_features
    return module.config.hidden_size
