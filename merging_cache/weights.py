"""Loads learned scorers' weights from a file, a folder or the hub."""

import json
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


def load_weights(name_or_path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`(config.json or {}, tensors by name)` of the weights there.

    Args:
        name_or_path: a file, a folder, or `owner/name` on the hub, with `/folder` or `/folder/file` behind it for a
            part of it. Of a folder all safetensors files are read, or where there is none its one `.pt` file. A `.pt`
            file holds a list of modules' tensors under `"module"`, of which module i's become `{i}.name`.

    Raises:
        ValueError: if there are none, if a folder holds several `.pt` files, or if the hub does not have or give them.
    """
    path = Path(name_or_path) if Path(name_or_path).exists() else _fetched(str(name_or_path))
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pt"))
    files = [file for file in files if file.suffix in FORMATS]
    if not files:
        raise ValueError(f"{name_or_path} holds no weights (safetensors files, or one .pt file)")
    if len(files) > 1 and files[0].suffix == ".pt":
        raise ValueError(f"{name_or_path} holds {[file.name for file in files]}; name one of these files")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file) if file.suffix == ".safetensors" else _load_modules(file)
    config = (path.parent if path.is_file() else path) / "config.json"
    return (json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}), tensors


def _load_modules(file: Path) -> dict[str, Tensor]:
    with torch.serialization.safe_globals(NUMPY_IN_PICKLES):
        modules = torch.load(file, map_location="cpu", weights_only=True)["module"]
    return {f"{index}.{name}": tensor for index, part in enumerate(modules) for name, tensor in part.items()}


def _fetched(name: str) -> Path:
    """The part of a repository on the hub that is called `owner/name`, `owner/name/folder` or `owner/name/../file`."""
    owner, repository, inside = (*name.split("/", 2), "", "")[:3]
    if not repository:
        raise ValueError(f"there is no folder {name}, and a name on the hub is owner/name")
    if inside.endswith(FORMATS):
        patterns = [inside]
    else:
        patterns = [f"{inside}/{file}".lstrip("/") for file in ("*.safetensors", "*.pt", "config.json")]
    try:
        return Path(snapshot_download(f"{owner}/{repository}", allow_patterns=patterns)) / inside
    except Exception as error:
        raise ValueError(f"there is no folder {name}, and the hub did not give it: {error}") from error
