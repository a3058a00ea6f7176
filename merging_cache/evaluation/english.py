"""RULER's tasks in RULER's own words.

The frames are those of arXiv:2404.06654 and github.com/NVIDIA/RULER (Apache-2.0): a benchmark is its prompts.
"""

import random
import re
import string
import uuid
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

from .documents import Quiz, read_hotpotqa, read_squad
from .wording import Frame, Wording, distinct, sample

_MAGIC = Frame(
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{text}",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
    128,
)
_MAGIC_ONE = Frame(
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{text}",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
    128,
)
_VARIABLES = Frame(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}",
    "\nQuestion: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {query}, they are: ",  # RULER's spelling
    30,
)
_COMMON = Frame(
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{text}",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
    120,
)
_FREQUENT = Frame(
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {text}",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
    50,
)
_DOCUMENTS = Frame(
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{text}",
    "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {query}",
    " Answer:",
    32,
)


@cache
def _english(*categories: str) -> list[str]:
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise ValueError(
            "RULER's tasks in English draw their words from the package wonderwords; pip install 'merging_cache[eval]'"
        ) from error
    return sorted(set(RandomWord().filter(include_categories=categories)))


class English(Wording):
    """RULER's tasks as RULER words them.

    Args:
        haystack: a text file (essays) to hide needles in, for the tasks that do.
        squad: SQuAD 2.0 as its authors publish it (`dev-v2.0.json`), for `qa_1`.
        hotpotqa: HotpotQA as its authors publish it (`hotpot_dev_distractor_v1.json`), for `qa_2`.

    Raises:
        ValueError: when a task needs a file that was not given or cannot be read.
    """

    frames = {
        "niah": _MAGIC_ONE,
        "niah values": _MAGIC,
        "niah queries": _MAGIC,
        "vt": _VARIABLES,
        "cwe": _COMMON,
        "fwe": _FREQUENT,
        "qa": _DOCUMENTS,
    }
    noise_line = (
        "The grass is green.",
        "The sky is blue.",
        "The sun is yellow.",
        "Here we go.",
        "There and back again.",
    )
    line_break = "\n"
    coded_noise = "..."
    repeats = ((4096, (6, 1)), (1 << 62, (30, 3)))
    solved_examples = True

    def __init__(self, haystack: Path | None = None, squad: Path | None = None, hotpotqa: Path | None = None) -> None:
        self.files = {"haystack": haystack, "squad": squad, "hotpotqa": hotpotqa}
        self._quizzes: dict[str, Quiz] = {}

    def has(self, material: str | None) -> bool:
        return material is None or self.files[material] is not None

    def _file(self, name: str) -> Path:
        if not self.has(name):
            raise ValueError(
                f"a task needs the file {name}, which cannot ship with this package; give its path ({name}=...)"
            )
        return self.files[name]

    @cached_property
    def _sentences(self) -> list[list[str]]:
        path = self._file("haystack")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the haystack {path} could not be read as a text: {error}") from error
        sentences = [sentence.split() for sentence in re.split(r"(?<=[.!?])\s+", text.strip())]
        if not any(sentences):
            raise ValueError(f"the haystack {path} has no words")
        return [sentence for sentence in sentences if sentence]

    def draw(self, kind: str, rng: random.Random, count: int) -> list[str]:
        makers = {
            "words": lambda: f"{rng.choice(_english('adjective'))}-{rng.choice(_english('noun'))}",
            "numbers": lambda: str(rng.randint(1_000_000, 9_999_999)),
            "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        }
        return distinct(count, makers[kind])

    def needle(self, kind: str, key: str, value: str) -> str:
        return f"One of the special magic {kind} for {key} is: {value}."

    def prose(self, rng: random.Random, size: int) -> list[str]:
        taken: list[str] = []
        index = 0
        while size > 0:
            sentence = self._sentences[index % len(self._sentences)][:size]
            taken.append(" ".join(sentence))
            size -= len(sentence)
            index += 1
        return taken

    def variables(self, rng: random.Random, count: int, letters: int) -> list[str]:
        return distinct(count, lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)))

    def number(self, rng: random.Random) -> str:
        return str(rng.randint(10_000, 99_999))

    def assignment(self, variable: str, value: str) -> str:
        return f"VAR {variable} = {value}" if value.isdigit() else f"VAR {variable} = VAR {value} "

    def list_words(self, rng: random.Random, count: int) -> list[str]:
        return sample(rng, _english("noun", "adjective", "verb"), count, "words")

    def word_list(self, words: Sequence[str]) -> str:
        return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))

    def coded_words(self, rng: random.Random, count: int) -> list[str]:
        return distinct(count, lambda: "".join(rng.choices(string.ascii_lowercase, k=6)))

    def query(self, keys: Sequence[str]) -> str:
        return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"

    def quiz(self, source: str, rng: random.Random, size: int) -> Quiz:
        if source not in self._quizzes:
            read = {"squad": read_squad, "hotpotqa": read_hotpotqa}[source]
            self._quizzes[source] = read(self._file(source))
        return self._quizzes[source]

    def documents(self, texts: Sequence[str]) -> str:
        return "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, start=1))
