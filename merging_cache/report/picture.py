"""Which tokens survived in each layer and head, and where the others went: a picture, and a page with the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..layers import MergingLayer
from ..stage import check_number
from ..states import ABSENT

LABELLED = 80  # tokens up to which a picture names every one


@dataclass(frozen=True)
class Fates:
    """What became of the tokens of one row of a batch.

    Args:
        layers: the indices of the layers that fold.
        holders: for each of them `[H, n]`, the position of the slot that holds each of the row's n tokens: its own for
            survivors, `DROPPED`, or `ABSENT` where the cache does not trace and the token has lost its slot.
    """

    layers: list[int]
    holders: list[Tensor]

    @classmethod
    def of(cls, layers: Mapping[int, MergingLayer], row: int) -> "Fates":
        """Of a row of the batch that these layers hold, by their indices.

        Raises:
            ValueError: if there is no such row, or the layers are empty.
        """
        folding = {index: layer for index, layer in layers.items() if layer.num_stored}
        if not folding:
            raise ValueError("the cache is empty, so there is nothing to show; generate with it first")
        batch = next(iter(folding.values())).batch
        if not 0 <= row < batch:
            raise ValueError(f"row is {row}, and the cache holds a batch of {batch} rows")
        return cls(list(folding), [layer.fates(row).cpu() for layer in folding.values()])

    @property
    def num_tokens(self) -> int:
        """n, the row's tokens."""
        return self.holders[0].shape[1]

    @property
    def traced(self) -> bool:
        """Whether it is known where the evicted went."""
        return all((holders != ABSENT).all() for holders in self.holders)


class Folded(Protocol):
    """A cache that tells what became of its tokens."""

    def fates(self, row: int) -> Fates:
        """Of a row of its batch."""


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    """A matplotlib figure that no window shows, and its panels, row by row.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures take matplotlib; pip install 'merging_cache[plot]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def render(package: str, name: str, **values: Any) -> str:
    """An HTML template of a package, filled in; what is text in it is escaped."""
    import jinja2

    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    source = files(package).joinpath(name).read_text(encoding="utf-8")
    return jinja2.Environment(**options).from_string(source).render(**values)


def plot_merges(
    cache: Folded,
    tokens: Sequence[str] | None = None,
    *,
    row: int = 0,
    html: str | Path | None = None,
) -> Any:
    """Draw which tokens survived and where the others went, in every layer and head.

    Give the cache `trace=True` to know where the evicted went; otherwise only the survivors are known.

    Args:
        cache: after it has folded.
        tokens: the row's tokens as text, padding left out, such as `tokenizer.convert_ids_to_tokens(ids)`: of the
            prompt, and of what was generated if you like.
        row: of the batch.
        html: where to write the page with the text: survivors are highlighted, and what was merged into them shows when
            the mouse points at them. It needs `tokens`.

    Returns:
        a matplotlib `Figure`, to call `savefig` of: a panel for each layer, a line for each head, a column for a token,
        coloured by the position of the slot that holds it. Survivors are solid and marked, merged tokens are pale in
        the colour of their survivor, dropped ones grey.

    Raises:
        ValueError: if the cache is empty, has no such row, or has seen more tokens than were given.
        TypeError: if tokens are no strings.
        ImportError: if matplotlib is not installed.
        OSError: if the page cannot be written.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from merging_cache import MergingDynamicCache, plot_merges
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
        >>> cache = MergingDynamicCache(config=model.config, recent_tokens=4, trace=True)
        >>> _ = model(torch.arange(1, 33)[None], past_key_values=cache)
        >>> figure = plot_merges(cache, [f"token{i}" for i in range(32)])
        >>> len(figure.axes)  # two layers and a colour bar
        3
    """
    check_number("row", row, int)
    fates = cache.fates(row)
    if tokens is not None and (isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens)):
        raise TypeError(f"tokens is {type(tokens).__name__}; give a list of strings, a string for each token")
    if tokens is not None and len(tokens) < fates.num_tokens:
        raise ValueError(
            f"{len(tokens)} tokens were given, but row {row} of the cache holds {fates.num_tokens}, padding not counted"
        )
    if html is not None and tokens is None:
        raise ValueError("the page shows the text, so it needs tokens=")
    figure = draw(fates, tokens)
    if html is not None:
        Path(html).write_text(text_page(fates, tokens[: fates.num_tokens]), encoding="utf-8")
    return figure


def draw(fates: Fates, tokens: Sequence[str] | None = None) -> Any:
    """The picture."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    count = fates.num_tokens
    heights = [0.25 + 0.16 * len(holders) for holders in fates.holders]
    named = tokens is not None and count <= LABELLED
    figure, panels = new_figure(min(16, 4 + 0.14 * count), 1.1 + sum(heights) + 0.5 * named, len(heights))
    colours, norm = colormaps["turbo"], Normalize(0, max(1, count - 1))
    for panel, layer, holders in zip(panels, fates.layers, fates.holders, strict=True):
        stays = holders == torch.arange(count)
        picture = torch.from_numpy(colours(norm(holders.clamp_min(0).numpy())))
        picture[..., 3] = torch.where(stays, 1.0, 0.35)
        picture[holders < 0] = torch.tensor([0.86, 0.86, 0.86, 1.0], dtype=picture.dtype)
        panel.imshow(picture.numpy(), aspect="auto", interpolation="nearest")
        if count <= 4 * LABELLED:
            heads, columns = stays.nonzero().T
            panel.plot(columns, heads, ".", color="black", markersize=2)
        panel.set_ylabel(f"layer {layer}", fontsize=7, rotation=0, ha="right", va="center")
        panel.set_yticks([])
        panel.tick_params(labelsize=7)
        if panel is not panels[-1] or named:
            panel.set_xticks([])
    if named:
        panels[-1].set_xticks(range(count), tokens[:count], rotation=90, fontsize=6, parse_math=False)
    else:
        panels[-1].set_xlabel("position", fontsize=8)
    went = "pale: merged into the slot of that colour, grey: dropped" if fates.traced else "grey: evicted"
    figure.suptitle(f"solid and dotted: kept; {went}", fontsize=9)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=panels, pad=0.01, aspect=40)
    bar.set_label("position of the slot", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    return figure


def text_page(fates: Fates, tokens: Sequence[str]) -> str:
    """The page: the text, and what became of each token in a layer and head of the reader's choice."""
    holders = {layer: of_heads.tolist() for layer, of_heads in zip(fates.layers, fates.holders, strict=True)}
    return render(__package__, "picture.html", tokens=list(tokens), holders=holders, traced=fates.traced)
