"""Three tasks that are not noise: facts hidden in prose, sentences to be quoted, and the text that goes on.

All three ask about one and the same context, so that a model reads it once: a stretch of prose that no other example
has, with eight facts between its sentences. How well a cache did is how likely it holds the right answer: the loss on
it, token for token.
"""

import bisect
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .example import Example
from .ruler import Task, fit_size
from .wording import Wording

NUM_FACTS = 8
NUM_QUOTATIONS = 4
QUOTED_FROM, QUOTED = 8, 12  # words of a passage that are given, and words that are to follow
FOLLOWING = 48  # words of the text that goes on


@dataclass(frozen=True)
class ProseTask(Task):
    """What is asked about a stretch of prose.

    Args:
        kind: `"facts"`, `"quotations"` or `"following"`.
    """

    kind: str
    generates = False
    needs = "prose"

    def make(self, name: str, wording: Wording, rng: random.Random, size: int, index: int, length: int) -> Example:
        raise NotImplementedError("there are several questions about each context: see `examples`")

    def examples(
        self, name: str, wording: Wording, count_tokens: Callable[[Example], int], length: int, seed: int, index: int
    ) -> list[Example]:
        made = prose_examples(wording, count_tokens, length, seed, index)
        return [example for example in made if example.task == self.kind]


@lru_cache(maxsize=1024)  # each of the tasks asks for the same ones
def prose_examples(
    wording: Wording, count_tokens: Callable[[Example], int], length: int, seed: int, index: int
) -> tuple[Example, ...]:
    """The examples of all three tasks about stretch `index`, as long as `length` tokens hold."""

    def make(size: int) -> tuple[tuple[Example, ...], int]:
        made = build_prose(wording, random.Random(f"{seed} prose {index}"), size, length, seed, index)
        return tuple(made), max(map(count_tokens, made))

    return fit_size("prose", make, 2 * (QUOTED_FROM + QUOTED), length)


def build_prose(wording: Wording, rng: random.Random, size: int, length: int, seed: int, index: int) -> list[Example]:
    """The examples of all three tasks about stretch `index` of the wording's prose, of which `size` words are read.

    Raises:
        ValueError: if the prose is too short for that.
    """
    sentences, after = wording.stretch(size, FOLLOWING, length, seed, index)
    passages = passages_of(sentences)
    if not passages:
        raise ValueError(f"{size} words of prose hold no passage to quote; ask for longer contexts")
    count = min(NUM_QUOTATIONS, len(passages))
    quoted = [passages[int((place + rng.random()) / count * len(passages))] for place in range(count)]
    facts = wording.facts(rng, NUM_FACTS)
    places = [round((place + rng.random()) / NUM_FACTS * len(sentences)) for place in range(NUM_FACTS)]
    for passage in quoted:  # nothing is put into the middle of what is to be quoted
        places = [passage.first if passage.first < place <= passage.last else place for place in places]
    pieces, first = [], 0
    for fact, place in zip(facts, sorted(places), strict=True):
        pieces += [*sentences[first:place], fact.sentence.split()]
        first = place
    pieces += sentences[first:]
    text = " ".join(" ".join(piece) for piece in pieces)
    fact_frame, quotation_frame = wording.frames["fact"], wording.frames["quotation"]
    made = [
        fact_frame.fill("facts", [fact.answer], text=text, question=fact.question, prefix=fact.answer_prefix)
        for fact in facts
    ]
    for passage in quoted:
        given, rest = (" ".join(part) for part in (passage.words[:QUOTED_FROM], passage.words[QUOTED_FROM:]))
        made.append(quotation_frame.fill("quotations", [rest], text=text, words=given))
    context = fact_frame.context.format(text=text)
    made.append(
        Example("following", context, None, f" {after[0]}", [" ".join(after[1:])], 0, (), f" {' '.join(after[1:])}")
    )
    return made


class Passage(NamedTuple):
    """Words that stand behind one another, from the beginning of sentence `first` into sentence `last`."""

    words: list[str]
    first: int
    last: int


def passages_of(sentences: Sequence[list[str]]) -> list[Passage]:
    """What can be quoted: from the beginning of each sentence as many words as that takes, if there are so many."""
    ends = list(itertools.accumulate(map(len, sentences)))
    words = [word for sentence in sentences for word in sentence]
    found = []
    for index, sentence in enumerate(sentences):
        start = ends[index] - len(sentence)
        if start + QUOTED_FROM + QUOTED <= len(words):
            end = start + QUOTED_FROM + QUOTED
            found.append(Passage(words[start:end], index, bisect.bisect_left(ends, end)))
    return found


PROSE = {kind: ProseTask(kind) for kind in ("facts", "quotations", "following")}
