"""calibrate: what is learned of a model once, written to a folder that caches load it from."""

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..budgets.profile import PROFILE_FILE, Profile
from ..evaluation.haystack import fitting_text
from ..model import most_positions
from ..stage import FACTS_FILE, check_number
from .excerpts import Excerpt, excerpts_of
from .gates import Gate, Lesson, fit_linear, fit_mlp
from .records import strewn
from .teacher import layers_in, read_twice, taught

LENGTHS = (512, 1024, 2048, 4096)
SAMPLE = 512  # tokens of each excerpt that a gate learns from
DEFAULT_TEXT = "the half of Python's language reference that evaluations do not use, strewn with made-up records"


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found out, and where it lies.

    Args:
        folder: what `calibration=`, `scorer={"name": "kvzap", "weights": ...}` and `budget={"name": "profile",
            "weights": ...}` take.
        model, architecture: the name of the model and its class.
        text, lengths, tokens: what was read, held-out excerpts included.
        in_chat: whether every other excerpt stood in a chat template.
        kind: `"linear"` or `"mlp"`, whichever was better on text that was held out.
        hidden_size: its width.
        layers: the indices of the layers that fold.
        errors: mean squared error of the logarithms of the scores on held-out text, by kind and layer.
        correlations: of what the gate says with what was drawn, by layer, the mean of its heads.
        seconds: how long reading and fitting took.
    """

    folder: Path
    model: str
    architecture: str
    text: str
    lengths: tuple[int, ...]
    tokens: int
    in_chat: bool
    kind: str
    hidden_size: int
    layers: tuple[int, ...]
    errors: dict[str, list[float]]
    correlations: list[float]
    seconds: dict[str, float]

    def __str__(self) -> str:
        """As a table."""
        lines = [f"{self.model} ({self.architecture}), gates: {self.kind}", "layer  " + "  ".join(self.errors) + "  r"]
        for number, layer in enumerate(self.layers):
            errors = "  ".join(f"{of_kind[number]:.3f}" for of_kind in self.errors.values())
            lines.append(f"{layer:5d}  {errors}  {self.correlations[number]:.3f}")
        return "\n".join(lines)


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    text: str | None = None,
    *,
    lengths: Sequence[int] | None = None,
    tokens_of_length: int = 8192,
    hidden_dim: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Learn what a model needs of its tokens: a gate for each layer that folds, and how much each head keeps.

    The model reads excerpts of a text, each twice: how much every layer's output would change in the second reading
    without a token (`leave_one_out`) is what a gate learns to tell from the attention's input alone (as in KVzap,
    arXiv:2601.07891), and one threshold over all of it gives the fraction of its tokens that each head keeps at every
    ratio. Half of the excerpts stand in the model's chat template. Linear gates and small MLPs are fitted; the better
    kind on held-out text is kept.

    What was read is kept in `folder/unfinished` until all is done, so a run that was stopped goes on where it was.
    Memory beside the model: the hidden states of one excerpt, and of one layer those of all sampled tokens.

    Args:
        model: a decoder whose attention goes through transformers' interface.
        tokenizer: its tokenizer.
        folder: where to write: weights in KVzap's format (`config.json`, `model.safetensors`), `profile.json`,
            `calibration.json`, and a card for people to read.
        text: what to read; by default the half of Python's language reference that the evaluation's haystack is not
            made of, strewn with made-up records. A text like what the model will read is better.
        lengths: of the excerpts, in tokens; by default 512, 1,024, 2,048 and 4,096, as far as the model has positions.
        tokens_of_length: tokens that are read of each length.
        hidden_dim: of the MLPs, a 24th of the model's by default.
        seed: of what is drawn.
        progress: whether to show progress bars.

    Raises:
        ValueError: for a text that is too short, lengths that the model has no positions for, and models that cannot
            read a prompt again or have no layer that folds.

    Example:
        >>> from merging_cache import MergingDynamicCache, calibrate, load_model
        >>> model, tokenizer = load_model("smollm2")  # doctest: +SKIP
        >>> print(calibrate(model, tokenizer, "smollm2-calibration"))  # doctest: +SKIP
        >>> cache = MergingDynamicCache(model=model, calibration="smollm2-calibration")  # doctest: +SKIP
    """
    folder = Path(folder)
    lengths = _checked_lengths(model, lengths)
    _check(tokenizer, folder, text, tokens_of_length, hidden_dim, seed)
    name, given = (DEFAULT_TEXT, strewn(fitting_text(), seed)) if text is None else ("a text of one's own", text)
    excerpts = excerpts_of(given, tokenizer, lengths, tokens_of_length, seed)
    start = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        files = _read(model, excerpts, folder, seed, progress)
    finally:
        model.train(was_training)
    read = time.perf_counter()
    layers, hidden_size = layers_in(files[0]), model.config.get_text_config(decoder=True).hidden_size
    held_out = [file for file, excerpt in zip(files, excerpts, strict=True) if excerpt.is_held_out]
    fitting = [file for file in files if file not in held_out]
    width = max(8, hidden_size // 24) if hidden_dim is None else hidden_dim
    gates: dict[str, list[Gate]] = {"linear": [], "mlp": []}
    for layer in tqdm(layers, desc="fitting", unit=" layers", disable=not progress):
        lesson = _lesson(layer, fitting, held_out, model.device)
        gates["linear"].append(fit_linear(lesson))
        gates["mlp"].append(fit_mlp(lesson, width, seed))
    fitted = time.perf_counter()
    kind = min(gates, key=lambda one: sum(gate.error for gate in gates[one]))
    calibration = Calibration(
        folder=folder,
        model=Path(model.config.name_or_path or "unnamed").name,
        architecture=type(model).__name__,
        text=name,
        lengths=lengths,
        tokens=sum(excerpt.input_ids.shape[1] for excerpt in excerpts),
        in_chat=any(excerpt.is_in_chat for excerpt in excerpts),
        kind=kind,
        hidden_size=hidden_size,
        layers=tuple(layers),
        errors={one: [gate.error for gate in of_kind] for one, of_kind in gates.items()},
        correlations=[float(gate.correlation.mean()) for gate in gates[kind]],
        seconds={"reading": round(read - start, 1), "fitting": round(fitted - read, 1)},
    )
    _write(calibration, gates[kind], _profile(gates[kind], files), model)
    for file in files:
        file.unlink()
    if not any((folder / "unfinished").iterdir()):
        (folder / "unfinished").rmdir()
    return calibration


def _checked_lengths(model: PreTrainedModel, lengths: Sequence[int] | None) -> tuple[int, ...]:
    """The lengths of excerpts, ascending."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is {type(model).__name__}; give a transformers model, such as load_model's")
    most = most_positions(model.config.get_text_config(decoder=True))
    if lengths is None:
        return tuple(one for one in LENGTHS if most is None or 2 * one <= most) or (most // 2,)
    if isinstance(lengths, str) or not isinstance(lengths, Sequence):
        raise TypeError(f"lengths is {lengths!r}; give a list of numbers of tokens")
    for length in lengths:
        check_number("a length", length, int, minimum=16)
    if not lengths:
        raise ValueError("lengths is empty; give the lengths of excerpts in tokens")
    if most is not None and 2 * max(lengths) > most:
        raise ValueError(
            f"an excerpt of {max(lengths)} tokens is read twice, but {type(model).__name__} has positions for {most}; "
            "give shorter lengths"
        )
    return tuple(sorted(set(lengths)))


def _check(
    tokenizer: Any, folder: Path, text: str | None, tokens_of_length: int, hidden_dim: int | None, seed: int
) -> None:
    """Refuse what cannot be right before anything is read."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer is {type(tokenizer).__name__}; give the model's tokenizer")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"text is {type(text).__name__}; give one string")
    check_number("tokens_of_length", tokens_of_length, int, minimum=1)
    check_number("seed", seed, int)
    if hidden_dim is not None:
        check_number("hidden_dim", hidden_dim, int, minimum=1)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to write to")
    if (folder / "config.json").exists() and not (folder / FACTS_FILE).exists():
        raise ValueError(
            f"{folder} holds the config of something else, a model perhaps; give another folder to write to"
        )


def _read(model: PreTrainedModel, excerpts: list[Excerpt], folder: Path, seed: int, progress: bool) -> list[Path]:
    """The files that the excerpts were read into, now or before."""
    read_before = hashlib.sha256(f"leave_one_out {model.dtype} {seed} {SAMPLE}".encode())
    for name, parameter in model.named_parameters():  # a part of each tells models apart
        some = parameter.detach().flatten()[:64].float().cpu()
        read_before.update(name.encode() + str(tuple(parameter.shape)).encode() + some.numpy().tobytes())
    for excerpt in excerpts:
        read_before.update(excerpt.input_ids.numpy().tobytes())
    unfinished = folder / "unfinished"
    unfinished.mkdir(parents=True, exist_ok=True)
    files = [unfinished / f"{read_before.hexdigest()[:16]}-{number}.safetensors" for number in range(len(excerpts))]
    total = sum(excerpt.input_ids.shape[1] for excerpt in excerpts)
    with tqdm(total=total, desc="reading twice", unit=" tokens", disable=not progress) as bar:
        for number, (file, excerpt) in enumerate(zip(files, excerpts, strict=True)):
            if not file.exists():
                read_twice(model, excerpt.input_ids, SAMPLE, seed + number, file)
            bar.update(excerpt.input_ids.shape[1])
    return files


def _lesson(layer: int, fitting: list[Path], held_out: list[Path], device: torch.device) -> Lesson:
    """What all files tell of one layer."""
    parts = [
        torch.cat(taught(files, f"{what}.{layer}")).float().to(device)
        for files in (fitting, held_out)
        for what in ("inputs", "scores")
    ]
    return Lesson(*parts)


def _profile(gates: list[Gate], files: list[Path]) -> Profile:
    """The mean of the profiles of all excerpts."""
    heads = [len(gate.correlation) for gate in gates]
    table = torch.stack(taught(files, "table")).double().mean(dim=0)
    return Profile([part.unsqueeze(0) for part in table.split(heads)])


def _write(calibration: Calibration, gates: list[Gate], profile: Profile, model: PreTrainedModel) -> None:
    """The folder: KVzap's format, the profile, the facts, and a card."""
    folder, count = calibration.folder, model.config.get_text_config(decoder=True).num_hidden_layers
    (folder / FACTS_FILE).unlink(missing_ok=True)  # written last: where it is, all the rest is, too
    by_layer = dict(zip(calibration.layers, gates, strict=True))
    # the format has a gate for every layer; those that do not fold have one that says nothing
    empty = {name: torch.zeros_like(one) for name, one in gates[0].weights.items()}
    tensors = {
        f"layers.{layer}.{name}": one.half().cpu().contiguous()
        for layer in range(count)
        for name, one in (by_layer[layer].weights if layer in by_layer else empty).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    last = [one for name, one in gates[0].weights.items() if name.endswith("weight")]
    config = {
        "model_type": "kvzap",
        "architectures": ["KVzapModel"],
        "input_dim": last[0].shape[1],
        "output_dim": last[-1].shape[0],
        "hidden_dim": None if len(last) == 1 else last[0].shape[0],
        "n_modules": count,
        "dtype": "float16",
    }
    _write_json(folder / "config.json", config)
    profile.to_json_file(folder / PROFILE_FILE, calibration.layers)
    (folder / "README.md").write_text(card(calibration), encoding="utf-8")
    facts: dict[str, Any] = asdict(calibration) | {"python": platform.python_version()}
    del facts["folder"]
    _write_json(folder / FACTS_FILE, facts)


def card(calibration: Calibration) -> str:
    """What people are told of a calibration, in Markdown."""
    errors, framed = calibration.errors, ", half of them in the chat template" * calibration.in_chat
    lines = [
        f"# Calibration of {calibration.model}",
        "",
        f"Gates ({calibration.kind}) and a profile of {calibration.architecture} for merging_cache, learned from "
        f"{calibration.tokens:,} tokens of {calibration.text} in excerpts of "
        f"{', '.join(map(str, calibration.lengths))} tokens{framed}. The gates are in KVzap's format; they tell the "
        "logarithm of how much the layer's output changes without a token in a second reading (`leave_one_out`).",
        "",
        f'    MergingDynamicCache(model=model, calibration="{calibration.folder.name}")',
        "",
        "On text that was held out, by which the kind of gates was chosen:",
        "",
        "| layer | error, linear | error, mlp | correlation |",
        "|---|---|---|---|",
    ]
    rows = zip(calibration.layers, errors["linear"], errors["mlp"], calibration.correlations, strict=True)
    lines += [f"| {layer} | {linear:.3f} | {mlp:.3f} | {correlation:.3f} |" for layer, linear, mlp, correlation in rows]
    return "\n".join(lines) + "\n"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
