"""Real prose to hide things in and to quote: files, or half of Python's language reference.

CPython's documentation lies in every installation (`pydoc_data.topics`, PSF licence). Nothing may be measured on what
something was fitted on, so its topics are shared out by their names, once and for all: one half is for evaluations, the
other for fitting.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

LEAST_WORDS = 10  # of a paragraph that reads as prose
LEAST_LETTERS = 0.88  # letters and spaces, as a share of its characters


def is_for_evaluation(topic: str) -> bool:
    """Whether a topic is of the half that is measured on: that depends on its name alone, in every Python."""
    return zlib.crc32(topic.encode()) % 2 == 0


@cache
def reference_prose(fitting: bool = False) -> tuple[str, ...]:
    """The paragraphs of one half of the language reference that read as prose, in the order of their topics.

    Args:
        fitting: the half for fitting things, without what the other half says, too.
    """
    halves: dict[bool, dict[str, None]] = {False: {}, True: {}}
    for name, text in sorted(topics.items()):
        halves[not is_for_evaluation(name)].update(dict.fromkeys(filter(is_prose, paragraphs(text))))
    return tuple(one for one in halves[fitting] if not fitting or one not in halves[False])


@cache
def fitting_text() -> str:
    """All of the half for fitting, code and tables included, but for paragraphs that stand in the other half, too."""
    measured = {one for name, text in topics.items() if is_for_evaluation(name) for one in paragraphs(text)}
    fitting = (text for name, text in sorted(topics.items()) if not is_for_evaluation(name))
    found = (block for text in fitting for block in blocks(text))
    return "\n\n".join(block for block in found if " ".join(block.split()) not in measured)


def blocks(text: str) -> list[str]:
    """What stands between the empty lines of a text."""
    return re.split(r"\n\s*\n", text)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a text, each on one line."""
    for paragraph in blocks(text):
        if words := paragraph.split():
            yield " ".join(words)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is made of sentences, and is no code, table or heading."""
    letters = sum(letter.isalpha() or letter == " " for letter in paragraph)
    ends = re.search(r"[.:!?][\")]?$", paragraph) is not None
    return ends and len(paragraph.split()) >= LEAST_WORDS and letters >= LEAST_LETTERS * len(paragraph)


def read_paragraphs(files: Sequence[Path]) -> tuple[str, ...]:
    """The paragraphs of text files, one after another; of the language reference where there are none.

    Raises:
        ValueError: for a file that cannot be read, or where none has words.
    """
    if not files:
        return reference_prose()
    found: list[str] = []
    for path in files:
        found += paragraphs(read_text(path, "the haystack"))
    if not found:
        raise ValueError(f"the haystack {', '.join(map(str, files))} has no words")
    return tuple(found)


def read_text(path: Path, what: str) -> str:
    """The text of a file, which holds `what`, `"the haystack"` say.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {path} could not be read as a text: {error}") from error


def sentences_of(text: Sequence[str]) -> list[list[str]]:
    """The sentences of paragraphs, each as its words."""
    found = (sentence.split() for one in text for sentence in re.split(r"(?<=[.!?])\s+", one))
    return [sentence for sentence in found if sentence]
