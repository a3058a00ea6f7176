"""Loads learned scorers' weights from a file, a folder or the hub."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

FORMATS = (".safetensors", ".pt")
# published gates carry the numbers of their training along as numpy arrays
_RECONSTRUCT = numpy.zeros(0).__reduce__()[0]
NUMPY_IN_PICKLES = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    numpy.ndarray,
    numpy.dtype,
    type(numpy.dtype("float32")),
    type(numpy.dtype("float64")),
]


class Weights:
    """The weights of a learned scorer, loaded when first looked at; copies and pickles hold only their name.

    Args:
        name_or_path: a file, a folder, or `owner/name` on the hub, with `/folder` or `/folder/file` behind it for a
            part of it. Of a folder all safetensors files are read, or where there is none its one `.pt` file. A `.pt`
            file holds a list of modules' tensors under `"module"`, of which module i's become `{i}.name`.
    """

    def __init__(self, name_or_path: str) -> None:
        self.name = str(name_or_path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Weights, (self.name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Weights":
        return self

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name.

        Raises:
            ValueError: if there are none, if a folder holds several `.pt` files, or if the hub does not give them.
        """
        path = Path(self.name) if Path(self.name).exists() else _fetched(self.name)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pt"))
        files = [file for file in files if file.suffix in FORMATS]
        if not files:
            raise ValueError(f"{self.name} holds no weights (safetensors files, or one .pt file)")
        if len(files) > 1 and files[0].suffix == ".pt":
            raise ValueError(f"{self.name} holds {[file.name for file in files]}; name one of these files")
        tensors: dict[str, Tensor] = {}
        for file in files:
            try:
                tensors |= load_file(file) if file.suffix == ".safetensors" else _load_modules(file)
            except Exception as error:
                raise ValueError(f"{file} could not be read as weights: {error}") from error
        return tensors

    def under(self, prefix: str, like: Tensor) -> dict[str, Tensor]:
        """Those whose names begin with `prefix`, by the rest of their names, as `like` in precision and device."""
        return {name[len(prefix) :]: part.to(like) for name, part in self.tensors.items() if name.startswith(prefix)}


def _load_modules(file: Path) -> dict[str, Tensor]:
    with torch.serialization.safe_globals(NUMPY_IN_PICKLES):
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("module"), list):
        raise ValueError(f"{file} does not hold a list of modules' tensors under 'module'")
    return {f"{i}.{name}": tensor for i, part in enumerate(content["module"]) for name, tensor in part.items()}


def _fetched(name: str) -> Path:
    """The part of a repository on the hub that is called `owner/name`, `owner/name/folder` or `owner/name/../file`."""
    owner, repository, inside = (*name.split("/", 2), "", "")[:3]
    if not repository:
        raise ValueError(f"there is no folder {name}, and a name on the hub is owner/name")
    if inside.endswith(FORMATS):
        patterns = [inside]
    else:
        patterns = [f"{inside}/{file}".lstrip("/") for file in ("*.safetensors", "*.pt")]
    try:
        return Path(snapshot_download(f"{owner}/{repository}", allow_patterns=patterns)) / inside
    except Exception as error:
        raise ValueError(f"there is no folder {name}, and the hub did not give it: {error}") from error
