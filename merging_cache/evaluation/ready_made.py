"""Reads examples that were made elsewhere: RULER's own files, and data sets in the columns that kvpress uses."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .english import English
from .example import Example
from .ruler import RULER


def read_examples(source: str, tasks: Iterable[str] | None, count: int, seed: int, folder: str | None) -> list[Example]:
    """`count` examples of each task, the same ones for the same seed.

    Args:
        source: a `.jsonl` or `.parquet` file, a folder of them, or the name of a data set on the hub.
        tasks: which tasks to take; all that there are where `None`.
        count: how many of each, or all where there are fewer.
        seed: which of them.
        folder: the data set's folder or configuration on the hub: RULER's are named by their length.

    Raises:
        ValueError: if there is no such data, or it holds no such task.
    """
    of_tasks: dict[str, list[Example]] = {}
    for example in map(example_of, _records(source, folder)):
        of_tasks.setdefault(example.task, []).append(example)
    for task in tasks if tasks is not None else of_tasks:
        if task not in of_tasks:
            raise ValueError(f"{source} holds no example of {task!r}; it holds {sorted(of_tasks)}")
    chosen = []
    for task in tasks if tasks is not None else sorted(of_tasks):
        examples = of_tasks[task]
        picked = sorted(random.Random(f"{seed} {task}").sample(range(len(examples)), min(count, len(examples))))
        chosen += [examples[index] for index in picked]
    return chosen


def _records(source: str, folder: str | None) -> Iterable[Mapping[str, Any]]:
    path = Path(source)
    if path.is_dir():
        files = sorted([*path.rglob("*.jsonl"), *path.rglob("*.parquet")])
        if not files:
            raise ValueError(f"{path} holds no .jsonl and no .parquet file")
        return [record for file in files for record in _records(str(file), folder)]
    if path.is_file():
        records = _read_parquet(path) if path.suffix == ".parquet" else _read_json_lines(path)
        named = next((name for name in (path.stem, path.parent.name) if name in RULER), None)
        return [record if named is None else {"task": named} | dict(record) for record in records]
    if path.suffix in (".jsonl", ".parquet") or source.startswith((".", "/", "~")):
        raise ValueError(f"there is no file {path}")
    return _load_dataset(source, folder)


def _read_json_lines(path: Path) -> list[Mapping[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} could not be read as JSON lines: {error}") from error


def _read_parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("reading .parquet files takes the package pyarrow; pip install datasets") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} could not be read as parquet: {error}") from error


def _load_dataset(name: str, folder: str | None) -> list[Mapping[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"{name} is no file, and loading it as a data set takes the package datasets; pip install datasets"
        ) from error
    try:
        return load_dataset(name, data_dir=folder, split="test").to_list()
    except Exception as error:  # the hub's errors are many
        raise ValueError(f"{name} is no file, and no data set could be loaded by that name: {error}") from error


def example_of(record: Mapping[str, Any]) -> Example:
    """An example from a record of RULER (`input`, `outputs`) or kvpress (`context`, `question`, `answer`).

    Raises:
        ValueError: if it is neither, or its task is unknown.
    """
    task = record.get("task")
    if task not in RULER:
        raise ValueError(
            f"a record is of task {task!r}; name one of {list(RULER)} in its column 'task', or by the file's name or "
            "folder"
        )
    kinds = [frame for kind, frame in English.frames.items() if kind.split()[0] == task.split("_")[0]]
    max_new_tokens = int(record.get("max_new_tokens") or kinds[0].max_new_tokens)
    if "context" in record:
        names = ("context", "question", "answer_prefix", "answer")
    elif "input" in record:
        names = ("input", "", "answer_prefix", "outputs")
    else:
        raise ValueError(f"a record of {task} has columns {sorted(record)}; expected 'context' or 'input' among them")
    context, question, answer_prefix = (str(record.get(name) or "") for name in names[:3])
    if not question:
        # a prompt in one piece: the question begins where its fixed words stand for the last time
        starts = [context.rfind(frame.question.split("{")[0]) for frame in kinds]
        if max(starts) <= 0:
            raise ValueError(f"a record of {task} has no question, and its input holds none in RULER's words")
        context, question = context[: max(starts)], context[max(starts) :]
    answers = record[names[3]]
    answers = [answers] if isinstance(answers, str) else list(answers)
    return Example(task, context, question, answer_prefix, answers, max_new_tokens)
