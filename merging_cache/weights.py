"""Loads learned scorers' weights from a folder or the hub."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor


def load_weights(name_or_path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`(config.json or {}, tensors by name)` of the weights there.

    Args:
        name_or_path: a folder, or `owner/name` on the hub, with `/folder` behind it for one of its folders. All
            safetensors files are read, or where there is none a single `.pt` file, whose list of modules becomes
            `{i}.name`.

    Raises:
        ValueError: if there are none.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        owner, name, *inside = str(name_or_path).split("/", 2) if "/" in str(name_or_path) else (name_or_path, "")
        start = f"{inside[0]}/" if inside else ""
        if not name:
            raise ValueError(f"there is no folder {name_or_path}, and a name on the hub is owner/name")
        patterns = [start + pattern for pattern in ("*.safetensors", "*.pt", "config.json")]
        folder = Path(snapshot_download(f"{owner}/{name}", allow_patterns=patterns)) / start
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if not tensors and len(files := list(folder.glob("*.pt"))) == 1:
        modules = torch.load(files[0], map_location="cpu", weights_only=True)["module"]
        tensors = {f"{index}.{name}": tensor for index, part in enumerate(modules) for name, tensor in part.items()}
    if not tensors:
        raise ValueError(f"{name_or_path} holds no weights (safetensors files, or one .pt file)")
    config = folder / "config.json"
    return (json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}), tensors
