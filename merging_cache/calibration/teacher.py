"""What a gate is to learn: the model reads an excerpt twice, and every layer tells its input and its scores."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..budgets.profile import table_of
from ..cache import MergingDynamicCache
from ..model import cache_argument
from ..scorers import LeaveOneOutScorer
from ..states import LayerStates, Statistics

LEAST = 1e-8  # the smallest score that is told from none
Take = Callable[[int, Tensor, Tensor], None]


class Teacher(LeaveOneOutScorer):
    """What leaving out a token changes, handed on together with the hidden states of the tokens.

    Args:
        take: called for each layer with its index, `[L, hidden]` and `[H, L]`.
    """

    needs_hidden_states = True

    def __init__(self, take: Take) -> None:
        super().__init__()
        self._take, self._inputs = take, {}

    def observe(self, states: LayerStates, new: int) -> Statistics | None:
        self._inputs[states.layer_idx] = states.hidden_states[0]
        return None

    def score(self, states: LayerStates) -> Tensor:
        scores = super().score(states)
        self._take(states.layer_idx, self._inputs.pop(states.layer_idx), scores[0])
        return scores


def read_twice(model: PreTrainedModel, input_ids: Tensor, sample: int, seed: int, file: Path) -> None:
    """Write what `sample` tokens of an excerpt teach, and what all of them say of the heads.

    The file holds of each layer i `inputs.{i}` `[n, hidden]` in 16 bits and `scores.{i}` `[n, H]`, the logarithms of
    how much leaving each token out changes, and `table` `[layers * H, STEPS + 1]`, the profile of the excerpt.
    """
    length = input_ids.shape[1]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(length, generator=generator)[:sample].sort().values
    dtype = model.dtype if model.dtype.itemsize == 2 else torch.float16
    tensors, scores = {}, []

    def take(layer: int, inputs: Tensor, drawn: Tensor) -> None:
        index = chosen.to(inputs.device)
        scores.append(drawn.cpu())
        tensors[f"inputs.{layer}"] = inputs[index].to(dtype).cpu().contiguous()
        tensors[f"scores.{layer}"] = drawn[:, index].mT.clamp_min(LEAST).log().cpu().contiguous()

    folded = {"budget": "uniform", "merger": "drop", "compression_ratio": 0.5}
    cache = MergingDynamicCache(model=model, scorer=Teacher(take), **folded)
    try:
        with torch.no_grad():
            model(input_ids.to(model.device), **cache_argument(cache), logits_to_keep=1)
    finally:
        cache.release()
    if not scores:
        raise ValueError(f"no layer of {type(model).__name__} folds, so there is nothing to calibrate")
    tensors["table"] = table_of(torch.cat(scores)).float()
    unfinished = file.with_suffix(".part")
    save_file(tensors, unfinished)
    unfinished.rename(file)


def layers_in(file: Path) -> list[int]:
    """The layers of which a file tells."""
    with safe_open(file, "pt") as opened:
        return sorted(int(name.split(".")[1]) for name in opened.keys() if name.startswith("inputs."))  # noqa: SIM118


def taught(files: list[Path], name: str) -> list[Tensor]:
    """The tensor of this name in each of the files."""
    found = []
    for file in files:
        with safe_open(file, "pt") as opened:
            found.append(opened.get_tensor(name))
    return found
