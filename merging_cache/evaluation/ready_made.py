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
    for number, record in enumerate(_records(source, folder), start=1):
        try:
            example = example_of(record)
        except ValueError as error:
            raise ValueError(f"{source}, record {number}: {error}") from error
        of_tasks.setdefault(example.task, []).append(example)
    if not of_tasks:
        raise ValueError(f"{source} holds no example")
    tasks = list(dict.fromkeys(tasks)) if tasks is not None else sorted(of_tasks)
    for task in tasks:
        if task not in of_tasks:
            raise ValueError(f"{source} holds no example of {task!r}; it holds {sorted(of_tasks)}")
    chosen = []
    for task in tasks:
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
        return [{"task": named} | record if named and isinstance(record, dict) else record for record in records]
    if path.suffix in (".jsonl", ".parquet") or source.startswith((".", "/", "~")):
        raise ValueError(f"there is no file {path}")
    return _load_dataset(source, folder)


def _read_json_lines(path: Path) -> list[Mapping[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
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
    if not isinstance(record, Mapping):
        raise ValueError(f"it is {record!r}; expected an object")
    task = record.get("task")
    if not isinstance(task, str) or task not in RULER:
        raise ValueError(
            f"its task is {task!r}; name one of {list(RULER)} in its column 'task', or by the file's name or folder"
        )
    kinds = [frame for kind, frame in English.frames.items() if kind.split()[0] == task.split("_")[0]]
    if "context" in record:
        names = ("context", "question", "answer_prefix", "answer")
    elif "input" in record:
        names = ("input", "", "answer_prefix", "outputs")
    else:
        raise ValueError(f"it has columns {sorted(record)}; expected 'context' or 'input' among them")
    context, question, answer_prefix = (_text(record, name) for name in names[:3])
    if not question:
        # a prompt in one piece: the question begins where its fixed words stand for the last time
        start = max(context.rfind(frame.question.split("{")[0]) for frame in kinds)
        if start <= 0:
            raise ValueError("it has no question, and its input holds none in RULER's words")
        context, question = context[:start], context[start:]
    if not context.strip():
        raise ValueError("its context is empty")
    answers = record.get(names[3])
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one for one in answers):
        raise ValueError(f"its {names[3]} is {answers!r}; expected a string or a list of strings")
    most = record.get("max_new_tokens")
    most = kinds[0].max_new_tokens if most is None else most
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"its max_new_tokens is {most!r}; expected a whole number of at least 1")
    reference = kinds[0].reference(answer_prefix, answers, any_is_right=RULER[task].metric == "part")
    return Example(task, context, question, answer_prefix, answers, most, reference=reference)


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"its {name} is {value!r}; expected a string")
    return value or ""
