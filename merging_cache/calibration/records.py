"""Made-up records to be strewn into a text: names, numbers and codes, of which running prose has too few.

What a model has to keep of a prompt is above all what cannot be guessed, and a gate learns that from what it has seen.
"""

import random
import re
from calendar import month_name

from ..evaluation.haystack import blocks

SYLLABLES = ("ba", "bel", "cor", "dan", "der", "el", "fen", "gar", "hol", "il", "jor", "kan", "lun", "mar", "nok", "or")
ENDINGS = ("pel", "quin", "ras", "sol", "tam", "ur", "vel", "wen", "yor", "zan")
THINGS = ("lamps", "seeds", "tiles", "ropes", "maps", "bells", "coats", "rings", "jars", "pipes", "clocks", "chairs")
RECORDS = (
    "{name} {name} lives at {number} {name} Street and repairs {things}.",
    "Invoice {number}-{number}: {number} {things} for {name}, due on {day} {month}.",
    "Room {number} opens with {code}.",
    "{name} was born in {name} in {number}, {day} miles from {name}.",
    "For the {things} ring {name}, extension {number}.",
    "{code} stands for {name} {name} and {code} for {name}.",
    "On {day} {month} the {name} took {number} {things} to {name}.",
)


def strewn(text: str, seed: int) -> str:
    """The paragraphs of a text, a record or two after every other one."""
    rng = random.Random(f"records {seed}")
    parts = []
    for paragraph in blocks(text):
        parts.append(paragraph)
        if rng.random() < 0.5:
            parts.append(" ".join(_record(rng) for _ in range(rng.randint(1, 2))))
    return "\n\n".join(parts)


def _record(rng: random.Random) -> str:
    """One record, every blank filled anew."""
    fill = {
        "name": lambda: "".join([*rng.choices(SYLLABLES, k=rng.randint(1, 2)), rng.choice(ENDINGS)]).capitalize(),
        "number": lambda: str(rng.randint(2, 9999)),
        "day": lambda: str(rng.randint(1, 28)),
        "month": lambda: rng.choice(month_name[1:]),
        "things": lambda: rng.choice(THINGS),
        "code": lambda: "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ23456789", k=rng.randint(4, 7))),
    }
    return re.sub(r"\{(\w+)\}", lambda blank: fill[blank[1]](), rng.choice(RECORDS))
