"""What was measured of which example of which cell: JSON lines, written as they come, to be gone on with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def key_of(cell: Mapping[str, Any]) -> str:
    """A cell as a text that is the same however its dict is ordered."""
    return json.dumps(cell, sort_keys=True)


class Results:
    """Cells and what was measured of their examples, in memory and in a file, of which the first line is the setting.

    A cell is a task, a context length and a cache.

    Args:
        path: the file, gone on with where it exists; `None` to keep everything in memory only.
        setting: what all cells have in common, which is not to change from one run to the next.

    Raises:
        ValueError: if the file was measured in another setting, or is none of ours.
    """

    def __init__(self, path: Path | None, setting: Mapping[str, Any]) -> None:
        self.path = path
        self.setting = json.loads(json.dumps(setting))
        self._measured: dict[str, dict[int, dict[str, Any]]] = {}
        if path is not None and path.exists():
            self._read(path)
        if path is not None and not self._measured:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"setting": self.setting}) + "\n", encoding="utf-8")

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # the last line is not, where a run was interrupted
            lines = [json.loads(line) for line in whole.splitlines()]
            setting = lines[0]["setting"] if lines else self.setting
            for line in lines[1:]:
                self._measured.setdefault(key_of(line["cell"]), {})[line["example"]] = line["measured"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of results: {type(error).__name__}: {error}") from error
        if setting != self.setting and self._measured:  # nothing of the other setting is lost otherwise
            changed = sorted(name for name in {*setting, *self.setting} if setting.get(name) != self.setting.get(name))
            was = ", ".join(f"{name}={setting.get(name)!r}" for name in changed)
            now = ", ".join(f"{name}={self.setting.get(name)!r}" for name in changed)
            raise ValueError(f"{path} was measured with {was}, and this run is to be with {now}; choose another output")
        if whole != text:
            path.write_text(whole, encoding="utf-8")

    def __contains__(self, cell: Mapping[str, Any]) -> bool:
        """Whether anything was measured of a cell."""
        return bool(self[cell])

    def __getitem__(self, cell: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        """What was measured of each example of a cell, by its index; nothing where nothing was."""
        return self._measured.get(key_of(cell), {})

    def add(self, cell: Mapping[str, Any], example: int, measured: Mapping[str, Any]) -> None:
        """Keep what was measured of an example, and write it down at once."""
        measured = json.loads(json.dumps(measured))
        self._measured.setdefault(key_of(cell), {})[example] = measured
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"cell": cell, "example": example, "measured": measured}) + "\n")
