"""The command: `python -m merging_cache.calibration --model M --output FOLDER`.

Learns what a model needs of its tokens, once: gates and a profile that `MergingDynamicCache(model=model,
calibration=FOLDER)` goes by. Stop it when you like: started again it goes on with what is missing.

    python -m merging_cache.calibration --model smollm2 --dtype bfloat16 --output smollm2-calibration
    python -m merging_cache.calibration --model Qwen/Qwen3-8B --dtype bfloat16 --device cuda --text *.txt --output qwen
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..evaluation.haystack import read_text
from ..model import SHIPPED_MODELS, load_model
from .calibrate import LENGTHS, calibrate

STOPPED = 130  # the exit status of what was interrupted


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m merging_cache.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help=f"{', '.join(SHIPPED_MODELS)}, a folder, a GGUF file, or a name on the hub",
    )
    add("--output", required=True, type=Path, metavar="FOLDER", help="where to write")
    add(
        "--text",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="what to read; default: the half of Python's language reference that evaluations do not use",
    )
    add(
        "--lengths",
        nargs="+",
        type=int,
        metavar="TOKENS",
        help=f"of excerpts; default: {' '.join(map(str, LENGTHS))}, as far as the model has positions",
    )
    add("--tokens", type=int, default=8192, help="that are read of each length; default: %(default)s")
    add("--hidden-dim", type=int, help="of the MLPs; default: a 24th of the model's hidden size")
    precisions = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", default="auto", choices=precisions, help="the model's precision; default: as stored")
    add("--device", help="default: cuda where there is one, else the CPU")
    add("--seed", type=int, default=0, help="default: 0")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate a model; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        device = device_of(options.device)
        text = None if options.text is None else "\n\n".join(read_text(path, "the text") for path in options.text)
        model, tokenizer = load_model(options.model, dtype=options.dtype)
        calibration = calibrate(
            model.to(device).eval(),
            tokenizer,
            options.output,
            text,
            lengths=options.lengths,
            tokens_of_length=options.tokens,
            hidden_dim=options.hidden_dim,
            seed=options.seed,
        )
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return STOPPED
    print(calibration)
    print(f"written to {options.output}; {', '.join(f'{k} {v:.0f} s' for k, v in calibration.seconds.items())}")
    return 0


def device_of(name: str | None) -> torch.device:
    """The device of this name; for `None` a GPU where there is one.

    Raises:
        ValueError: if there is none.
    """
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
