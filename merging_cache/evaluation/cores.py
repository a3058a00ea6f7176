"""A fair share of the machine's cores: processes that each take all of them are far slower than those that share."""

import getpass
import os
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout


class Cores:
    """One evaluation among those that run on this machine, until it is left or the process ends.

    Args:
        count: how many cores there are; by default those that this process may use.
        folder: where evaluations find one another; by default one of the user's in the folder for temporary files.
    """

    def __init__(self, count: int | None = None, folder: Path | None = None) -> None:
        usable = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))
        self.count = count or len(usable(0))
        folder = folder or Path(tempfile.gettempdir()) / f"merging_cache-{getpass.getuser()}"
        folder.mkdir(parents=True, exist_ok=True)
        # more evaluations than cores all get one core anyway
        self._seats = [FileLock(folder / f"{number}.lock") for number in range(self.count)]
        self._mine = next((seat for seat in self._seats if taken(seat)), None)

    @property
    def share(self) -> int:
        """How many cores are this evaluation's, now."""
        others = 0
        for seat in self._seats:
            if seat is self._mine:
                continue
            if taken(seat):
                seat.release()
            else:
                others += 1
        return max(1, self.count // (others + 1))

    def leave(self) -> None:
        """Leave the cores to the others."""
        if self._mine is not None:
            self._mine.release()
            self._mine = None


def taken(seat: FileLock) -> bool:
    """Whether a lock was free, and is now held."""
    try:
        seat.acquire(blocking=False)
    except Timeout:
        return False
    return True
