"""RULER's tasks in the few hundred words of the shipped model."""

import random
from collections.abc import Collection, Sequence

from .documents import DocumentQuestion, Quiz
from .example import Example
from .wording import Fact, Frame, Wording, sample

_NAMES = """
amber anchor apple arrow autumn badger bamboo barley basil beacon birch bottle bridge bronze butter cactus candle
canyon carbon castle cedar cherry circle cliff clover cobalt comet copper coral cotton crane crystal daisy desert
diamond dolphin dragon eagle ember engine falcon feather fern fiddle flame forest fossil fountain fox garden garnet
ginger glacier granite grape hammer harbor hazel heron honey horizon indigo iris iron island ivory jacket jade jasmine
jungle kettle kitten ladder lantern lemon lilac lily linen lion lotus magnet mango maple marble meadow melon mint
mirror moon mountain needle nickel oak ocean olive onyx opal orange orchid otter owl palm panther paper peach pearl
pebble pepper pine planet plum pocket quartz rabbit raven ribbon river rocket rose ruby saddle saffron salmon sapphire
silver sparrow spruce stone sunset swan thistle tiger topaz tulip turtle valley velvet violet walnut willow winter wolf
"""

_FILLER = """
people walk along the road and talk about weather while children play near old houses every morning some of them carry
bread or milk others sit quietly reading long letters from friends who moved away years ago nobody knows when rain
will stop but most agree it must end soon because clouds look thin today market opens early with fresh fruit warm soup
and many small things to buy
"""

NAMES, FILLER = _NAMES.split(), _FILLER.split()
CODES = [str(1000 + 37 * i) for i in range(192)]
ATTRIBUTES = ["home", "friend", "drink", "color"]

# the sentences' own words; with the lists above they are the whole vocabulary of the needle model
GLUE = [
    *(".", ":", "code", "the", "passage", "begins", "end", "vote", "for", "question", "three", "most", "common"),
    *("votes", "are", "all", "each", "set", "list", "text", "ten", "...", "page", *ATTRIBUTES),
]


def filler_sentence(rng: random.Random, most: int = 9) -> str:
    """A sentence of 4 to 9 words that say nothing, or of as many as there are left."""
    return " ".join([*rng.choices(FILLER, k=min(rng.randint(4, 9), most)), "."])


def count_words(example: Example) -> int:
    """Tokens of an example's prompt and the longest answer to it: every word is one."""
    return len(example.prompt.split()) + example.max_new_tokens


class NeedleWords(Wording):
    """The same tasks in the words of the shipped model, one token each.

    A name has a code, a uuid is a code and two names, a document tells of a name what its home, friend, drink and color
    are. Nothing is announced: the context is the haystack alone.
    """

    frames = {
        "niah": Frame("{text}", " question : code {query}", "", 4),
        "niah values": Frame("{text}", " question : all code {query}", "", 5, " "),
        "niah queries": Frame("{text}", " question : each code {query}", "", 9, " "),
        "vt": Frame("{text}", " question : set {query}", "", 6, " "),
        "cwe": Frame("list {text} .", " question : ten most common are", "", 11, " "),
        "fwe": Frame("text {text} .", " question : three most common are", "", 4, " "),
        "qa": Frame("{text}", " question : {query}", "", 4),
        "fact": Frame("{text}", " question : {question}", "", 4),
        "quotation": Frame("{text}", "", " {words}", 17),
    }
    noise_line = ("people walk along the road .", "children play near old houses .")
    line_break = " "
    coded_noise = "..."
    repeats = ((160, (6, 1)), (384, (12, 2)), (1 << 62, (30, 3)))

    @staticmethod
    def are(vocabulary: Collection[str]) -> bool:
        """Whether a vocabulary has these words and hardly any others."""
        words = {*GLUE, *NAMES, *CODES, *FILLER}
        return words <= set(vocabulary) and len(vocabulary) < len(words) + 10

    def has(self, material: str | None) -> bool:
        return material != "prose"  # its filler is asked about only where that is asked for

    def draw(self, kind: str, rng: random.Random, count: int) -> list[str]:
        pool = NAMES if kind == "words" else CODES
        drawn = sample(rng, pool, count, f"{kind} of the needle model")
        return [" ".join([code, *rng.choices(NAMES, k=2)]) for code in drawn] if kind == "uuids" else drawn

    def needle(self, kind: str, key: str, value: str) -> str:
        return f"code {key} {value} ."

    def prose(self, rng: random.Random, size: int) -> list[str]:
        sentences: list[str] = []
        while size > 1:
            sentences.append(filler_sentence(rng, size - 1))
            size -= len(sentences[-1].split())
        return sentences

    def stretch(
        self, size: int, following: int, length: int, seed: int, index: int
    ) -> tuple[list[list[str]], list[str]]:
        rng, sentences = random.Random(f"{seed} stretch {index}"), []
        while size > 0:
            sentences.append(filler_sentence(rng).split())
            size -= len(sentences[-1])
        after: list[str] = []
        while len(after) < following:
            after += filler_sentence(rng).split()
        return sentences, after[:following]

    def facts(self, rng: random.Random, count: int) -> list[Fact]:
        names, codes = self.draw("words", rng, count), self.draw("numbers", rng, count)
        return [
            Fact(self.needle("numbers", name, code), f"code {name}", "", code)
            for name, code in zip(names, codes, strict=True)
        ]

    def variables(self, rng: random.Random, count: int, letters: int) -> list[str]:
        return sample(rng, NAMES, count, "words of the needle model")

    def number(self, rng: random.Random) -> str:
        return rng.choice(CODES)

    def assignment(self, variable: str, value: str) -> str:
        return f"set {variable} {value} ."

    def list_words(self, rng: random.Random, count: int) -> list[str]:
        return sample(rng, NAMES, count, "words of the needle model")

    def word_list(self, words: Sequence[str]) -> str:
        return " ".join(words)

    def coded_words(self, rng: random.Random, count: int) -> list[str]:
        return sample(rng, NAMES, count, "words of the needle model")

    def query(self, keys: Sequence[str]) -> str:
        return " ".join(keys)

    def quiz(self, source: str, rng: random.Random, size: int) -> Quiz:
        """One question about documents that are made up on the spot."""
        count = size // 20 + 3
        subjects = sample(rng, NAMES, count, "documents in words of the needle model")
        facts = {name: {attribute: rng.choice(NAMES) for attribute in ATTRIBUTES} for name in subjects}
        asked, friend = rng.sample(range(count), 2)
        facts[subjects[asked]]["friend"] = subjects[friend]
        documents = []
        for name, of_name in facts.items():
            sentences = [f"{name} {attribute} {value} ." for attribute, value in of_name.items()]
            sentences.insert(rng.randint(0, len(sentences)), filler_sentence(rng))
            documents.append(" ".join(sentences))
        attribute = rng.choice([attribute for attribute in ATTRIBUTES if attribute != "friend"])
        if source == "squad":
            own, text, about = (asked,), f"{subjects[asked]} {attribute}", asked
        else:
            own, text, about = (asked, friend), f"{attribute} {subjects[asked]} friend", friend
        return Quiz(documents, [DocumentQuestion(text, [facts[subjects[about]][attribute]], own)])

    def documents(self, texts: Sequence[str]) -> str:
        return " ".join(f"page {text}" for text in texts)
