"""The table of tasks: RULER's, and those about prose. Adding one is a class and a line here."""

from .prose import PROSE
from .ruler import RULER, Task

TASKS: dict[str, Task] = {**RULER, **PROSE}
