"""English: RULER's tasks in RULER's own words, and facts to hide in prose.

RULER's frames are those of arXiv:2404.06654 and github.com/NVIDIA/RULER (Apache-2.0): a benchmark is its prompts.
"""

import bisect
import itertools
import random
import string
import uuid
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

from .documents import Quiz, read_hotpotqa, read_squad
from .haystack import read_paragraphs, sentences_of
from .wording import Fact, Frame, Wording, distinct, sample

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

_READ = "Read the following text. You will be asked about it afterwards.\n\n{text}"
_FACT = Frame(_READ, "\n\nQuestion: {question}", " {prefix}", 8)
_QUOTATION = Frame(_READ, "\n\nQuote a passage of the text above, word for word.", " {words}", 32)

# what facts are made of; everything named is one word
_PEOPLE = "Alice Boris Carmen Daniel Edith Felix Greta Hassan Irene Jonas Karin Laszlo Maria Nadia Oscar Paula"
_CITIES = "Lisbon Vienna Oslo Dublin Prague Athens Warsaw Geneva Hamburg Naples Seville Tallinn Boston Denver"
_THINGS = "mirror teapot carpet bookcase statue piano lantern clock basket cushion flowerpot drawer ladder stove"
_COLOURS = "green purple orange yellow black white brown silver crimson turquoise"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_DRINKS = "coffee cocoa lemonade cider milk tea water juice"
_TRADES = "baker plumber surgeon violinist pilot gardener judge tailor carpenter chemist"

# a sentence, a question, the beginning of the answer, and what the rest of it is drawn from (four digits if nothing)
_FACTS = (
    (
        "The access code for the {city} office is {answer}.",
        "What is the access code for the {city} office?",
        "The access code for the {city} office is",
        None,
    ),
    (
        "{person} keeps the spare key behind the {answer}.",
        "Where does {person} keep the spare key?",
        "{person} keeps the spare key behind the",
        _THINGS,
    ),
    (
        "The meeting with {person} has been moved to {answer}.",
        "To which day has the meeting with {person} been moved?",
        "The meeting with {person} has been moved to",
        _DAYS,
    ),
    (
        "The front door of the house in {city} is painted {answer}.",
        "In which colour is the front door of the house in {city} painted?",
        "The front door of the house in {city} is painted",
        _COLOURS,
    ),
    (
        "In the year {answer} the old bridge of {city} was rebuilt.",
        "When was the old bridge of {city} rebuilt?",
        "The old bridge of {city} was rebuilt in the year",
        None,
    ),
    (
        "{person} moved to {answer} last spring.",
        "Where did {person} move last spring?",
        "Last spring {person} moved to",
        _CITIES,
    ),
    (
        "For breakfast {person} always drinks {answer}.",
        "What does {person} always drink for breakfast?",
        "For breakfast {person} always drinks",
        _DRINKS,
    ),
    (
        "The neighbour of {person} works as a {answer}.",
        "What does the neighbour of {person} work as?",
        "The neighbour of {person} works as a",
        _TRADES,
    ),
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
        haystack: text files to hide things in; half of Python's language reference where there are none.
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
        "fact": _FACT,
        "quotation": _QUOTATION,
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

    def __init__(self, haystack: Sequence[Path] = (), squad: Path | None = None, hotpotqa: Path | None = None) -> None:
        self.haystack = haystack
        self.files = {"squad": squad, "hotpotqa": hotpotqa}
        self._quizzes: dict[str, Quiz] = {}

    def has(self, material: str | None) -> bool:
        return material in (None, "haystack", "prose") or self.files[material] is not None

    def _file(self, name: str) -> Path:
        if not self.has(name):
            raise ValueError(
                f"{'qa_1' if name == 'squad' else 'qa_2'} asks about the file {name}, which cannot ship with this "
                f"package; give its path ({name}=..., --{name}), or other tasks"
            )
        return self.files[name]

    @cached_property
    def _sentences(self) -> list[list[str]]:
        return sentences_of(read_paragraphs(self.haystack))

    @cached_property
    def _ends(self) -> list[int]:
        """How many words the haystack has up to the end of each sentence."""
        return list(itertools.accumulate(map(len, self._sentences)))

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
        if size > self._ends[-1]:
            raise ValueError(f"the haystack has {self._ends[-1]} words, fewer than a context takes; give more text")
        index, taken = rng.randrange(len(self._sentences)), []
        while size > 0:
            sentence = self._sentences[index % len(self._sentences)][:size]
            taken.append(" ".join(sentence))
            size -= len(sentence)
            index += 1
        return taken

    def stretch(
        self, size: int, following: int, length: int, seed: int, index: int
    ) -> tuple[list[list[str]], list[str]]:
        # a word is a token at least, so what begins so many words apart never meets
        each = length + following
        count = self._ends[-1] // each
        if index >= count:
            raise ValueError(
                f"the haystack has {self._ends[-1]} words, enough for {max(0, count)} contexts of {length} tokens that "
                f"share nothing, and this is number {index + 1}; give more text, or ask for fewer or shorter ones"
            )
        place = random.Random(f"{seed} stretch").sample(range(count), count)[index]
        first = bisect.bisect_left(self._ends, place * each)
        sentences = self._sentences[first:]
        # whole sentences, up to the one in which word `size` stands
        last = bisect.bisect_left(self._ends, size + (self._ends[first - 1] if first else 0)) - first + 1
        after = list(itertools.islice(itertools.chain.from_iterable(sentences[last:]), following))
        return sentences[:last], after

    def facts(self, rng: random.Random, count: int) -> list[Fact]:
        cities, people = (rng.sample(names.split(), count) for names in (_CITIES, _PEOPLE))
        made = []
        for (sentence, question, prefix, answers), city, person in zip(
            rng.sample(_FACTS, count), cities, people, strict=False
        ):
            others = [] if answers is None else [answer for answer in answers.split() if answer != city]
            answer = rng.choice(others) if others else str(rng.randint(1000, 1999))
            words = {"city": city, "person": person, "answer": answer}
            made.append(Fact(*(part.format(**words) for part in (sentence, question, prefix)), answer))
        return made

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
