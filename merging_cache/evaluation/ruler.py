"""RULER's 13 tasks (arXiv:2404.06654): how each is built, in whatever wording.

A task hides something in a haystack of a given size and asks for it. Sizes are in the smallest pieces that a haystack
is made of, so that `fit` can meet a length in tokens closely. All randomness comes from the generator that is given.
"""

import itertools
import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from .example import Example
from .wording import Wording

Made = TypeVar("Made")


class Task(ABC):
    """One of RULER's tasks.

    Attributes:
        metric: `"all"`: the share of the answers that are given; `"part"`: whether any is.
        generates: whether an answer is generated and looked through; otherwise it is right if the model, word for word,
            would have given the reference.
    """

    metric = "all"
    generates = True

    @property
    def needs(self) -> str | None:
        """The material it is made of, where words are not enough: `"haystack"`, `"squad"` or `"hotpotqa"`."""
        return None

    @property
    def least(self) -> int:
        """The size of the smallest haystack in which the answer is told."""
        return 1

    def examples(
        self, name: str, wording: Wording, count_tokens: Callable[[Example], int], length: int, seed: int, index: int
    ) -> list[Example]:
        """Example `index` of `length` tokens: one question about its context, or several; see `fit`."""
        return [fit(name, wording, count_tokens, length, seed=seed, index=index, task=self)]

    @abstractmethod
    def make(self, name: str, wording: Wording, rng: random.Random, size: int, index: int, length: int) -> Example:
        """An example whose haystack has `size` pieces.

        Args:
            name: what the task is called.
            wording: what it is said in.
            rng: where randomness comes from.
            size: pieces of the haystack.
            index: which example this is, for tasks that ask their questions in order.
            length: the length in tokens that is aimed at; a few numbers depend on it.

        Raises:
            ValueError: if the wording has not enough words for so much.
        """


@dataclass(frozen=True)
class NeedleInAHaystack(Task):
    """Sentences that give keys their values, hidden in a haystack; asked for are the values of some keys.

    Args:
        haystack: `"noise"` (the same sentences again and again), `"prose"` (essays) or `"needles"` (more of them).
        keys, values: what they are: `"words"`, `"numbers"` or `"uuids"`.
        num_keys, num_values, num_queries: how many there are, values of each key, and keys that are asked for.
        depth: where the first needle that is asked for stands, as the share of the haystack before it; random, as in
            RULER, unless given.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    depth: float | None = None

    @property
    def needs(self) -> str | None:
        return "haystack" if self.haystack == "prose" else None

    def at(self, depth: float) -> "NeedleInAHaystack":
        """The same with a needle at this depth."""
        return replace(self, depth=depth)

    def make(self, name: str, wording: Wording, rng: random.Random, size: int, index: int, length: int) -> Example:
        num_keys = max(self.num_keys, self.num_queries)
        distractors = size if self.haystack == "needles" else 0
        keys = wording.draw(self.keys, rng, num_keys + distractors)
        values = iter(wording.draw(self.values, rng, num_keys * self.num_values + distractors))
        facts = [(key, next(values)) for key in keys[:num_keys] for _ in range(self.num_values)]
        if self.haystack == "noise":
            lines = wording.noise(size)
        elif self.haystack == "prose":
            lines = wording.prose(rng, size)
        else:
            lines = [wording.needle(self.values, *fact) for fact in zip(keys[num_keys:], values, strict=True)]

        asked = rng.sample(keys[:num_keys], self.num_queries)
        wanted = [fact for key in asked for fact in facts if fact[0] == key]
        places = dict(zip(rng.sample(facts, len(facts)), self._places(rng, len(lines), len(facts)), strict=True))
        if self.depth is not None:
            places[wanted[0]] = round(self.depth * len(lines))
        for fact in sorted(places, key=places.get, reverse=True):
            lines.insert(places[fact], wording.needle(self.values, *fact))

        one = len(wanted) == 1
        frame = wording.frames["niah" if one else "niah values" if self.num_queries == 1 else "niah queries"]
        return frame.fill(
            name,
            answers=[value for _, value in wanted],
            depths=tuple(places[fact] / max(1, len(lines) - len(facts)) for fact in wanted),
            text=(" " if self.haystack == "prose" else wording.line_break).join(lines),
            query=wording.query(asked),
            kind=self.values[:-1] if one else self.values,
        )

    def _places(self, rng: random.Random, num_lines: int, count: int) -> list[int]:
        """How many lines come before each of `count` needles; in essays at `count` of 40 even depths."""
        if self.haystack == "prose":
            return [int(num_lines * round(100 * depth / 39) / 100) for depth in rng.sample(range(40), count)]
        return [min(place, num_lines) for place in rng.sample(range(max(num_lines, count)), count)]


@dataclass(frozen=True)
class VariableTracking(Task):
    """A chain of assignments in noise, each to what the variable before holds; asked for are all that hold a number.

    Args:
        num_chains, num_hops: chains, of which the first is asked for, and assignments in each after the first.
    """

    num_chains: int = 1
    num_hops: int = 4

    def make(self, name: str, wording: Wording, rng: random.Random, size: int, index: int, length: int) -> Example:
        example = self._solved(name, wording, rng) if wording.solved_examples else ""
        built = self._build(name, wording, rng, wording.noise(size), letters=5)
        return replace(built, context=example + built.context)

    def _solved(self, name: str, wording: Wording, rng: random.Random) -> str:
        """A short one with its answer, to show what is wanted."""
        ten_lines = wording.noise(10 * len(wording.noise_line))
        built = self._build(name, wording, rng, ten_lines, letters=3)
        return built.prompt + " ".join(built.answers) + "\n\n"

    def _build(self, name: str, wording: Wording, rng: random.Random, lines: list[str], letters: int) -> Example:
        per_chain = self.num_hops + 1
        variables = wording.variables(rng, self.num_chains * per_chain, letters)
        number = None
        for first in range(0, len(variables), per_chain):
            chain = variables[first : first + per_chain]
            value = wording.number(rng)
            number = number or value
            assigned = [(chain[0], value), *((after, before) for before, after in itertools.pairwise(chain))]
            statements = [wording.assignment(*pair) for pair in assigned]
            places = sorted(rng.sample(range(max(len(lines), per_chain)), per_chain))
            for place, statement in reversed(list(zip(places, statements, strict=True))):
                lines.insert(place, statement)
        return wording.frames["vt"].fill(
            name,
            answers=variables[:per_chain],
            text=wording.line_break.join(lines),
            query=number,
            count=per_chain,
        )


@dataclass(frozen=True)
class CommonWords(Task):
    """A list in which some words are repeated more often than the others; asked for are those.

    Args:
        num_common: how many words are common.
    """

    num_common: int = 10

    def make(self, name: str, wording: Wording, rng: random.Random, size: int, index: int, length: int) -> Example:
        short = length < 4096
        example = ""
        if wording.solved_examples:
            solved = self._build(name, wording, rng, *((10, (3, 1)) if short else (30, (10, 3))))
            example = f"{solved.prompt} {wording.word_list(solved.answers)}\n"
        built = self._build(name, wording, rng, size, wording.repeats_at(length))
        return replace(built, context=example + built.context)

    def _build(
        self, name: str, wording: Wording, rng: random.Random, uncommon: int, repeats: tuple[int, int]
    ) -> Example:
        words = wording.list_words(rng, self.num_common + uncommon)
        common, others = words[: self.num_common], words[self.num_common :]
        listed = common * repeats[0] + others * repeats[1]
        rng.shuffle(listed)
        return wording.frames["cwe"].fill(name, answers=common, text=wording.word_list(listed))


@dataclass(frozen=True)
class FrequentWords(Task):
    """Coded words as often as Zipf's law has it, the most frequent being noise; asked for are the next three.

    Args:
        alpha: the exponent: the word of rank k is `k ** -alpha / zeta(alpha)` of the words.
    """

    alpha: float = 2.0

    def make(self, name: str, wording: Wording, rng: random.Random, size: int, index: int, length: int) -> Example:
        words = [wording.coded_noise, *wording.coded_words(rng, max(4, length // 50) - 1)]
        counts = [int(size * rank**-self.alpha / zeta(self.alpha)) for rank in range(1, len(words) + 1)]
        coded = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
        rng.shuffle(coded)
        return wording.frames["fwe"].fill(name, answers=words[1:4], text=" ".join(coded))

    @property
    def least(self) -> int:
        # from here on the word of rank 4 appears more often than that of rank 5
        return math.ceil(zeta(self.alpha) / (4**-self.alpha - 5**-self.alpha))


@dataclass(frozen=True)
class DocumentQuestions(Task):
    """A question about one of many documents, or about two.

    Args:
        source: `"squad"` or `"hotpotqa"`.
    """

    source: str
    metric = "part"

    @property
    def needs(self) -> str | None:
        return self.source

    def make(self, name: str, wording: Wording, rng: random.Random, size: int, index: int, length: int) -> Example:
        quiz = wording.quiz(self.source, rng, size)
        question = quiz.questions[index % len(quiz.questions)]
        related = [number for number in question.related if number not in question.own]
        near = {*question.own, *related}
        others = [number for number in range(len(quiz.documents)) if number not in near]
        texts = [quiz.documents[number] for number in question.own]
        for number in rng.sample(related, len(related)) + rng.sample(others, len(others)):
            if size <= 0:
                break
            texts.append(first_words(quiz.documents[number], size))
            size -= len(texts[-1].split())
        if size > 0:
            raise ValueError(f"there are only {len(quiz.documents)} documents; ask for shorter contexts")
        rng.shuffle(texts)
        return wording.frames["qa"].fill(
            name,
            answers=question.answers,
            any_is_right=True,
            text=wording.documents(texts),
            query=question.text,
        )


@cache
def zeta(alpha: float) -> float:
    """Riemann's zeta function, by its first terms and the integral of the others."""
    terms = 1000
    return sum(rank**-alpha for rank in range(1, terms)) + (terms - 0.5) ** (1 - alpha) / (alpha - 1)


def first_words(text: str, count: int) -> str:
    """The text up to its `count`-th word, spaces and all."""
    words = list(itertools.islice(re.finditer(r"\S+", text), count))
    return text[: words[-1].end()] if words else ""


RULER: dict[str, Task] = {
    "niah_single_1": NeedleInAHaystack("noise"),
    "niah_single_2": NeedleInAHaystack("prose"),
    "niah_single_3": NeedleInAHaystack("prose", values="uuids"),
    "niah_multikey_1": NeedleInAHaystack("prose", num_keys=4),
    "niah_multikey_2": NeedleInAHaystack("needles"),
    "niah_multikey_3": NeedleInAHaystack("needles", keys="uuids", values="uuids"),
    "niah_multivalue": NeedleInAHaystack("prose", num_values=4),
    "niah_multiquery": NeedleInAHaystack("prose", num_queries=4),
    "vt": VariableTracking(),
    "cwe": CommonWords(),
    "fwe": FrequentWords(),
    "qa_1": DocumentQuestions("squad"),
    "qa_2": DocumentQuestions("hotpotqa"),
}


def fit(
    name: str,
    wording: Wording,
    count_tokens: Callable[[Example], int],
    length: int,
    *,
    seed: int = 0,
    index: int = 0,
    task: Task | None = None,
) -> Example:
    """Example `index` of a task, with as large a haystack as `length` tokens hold.

    Args:
        name: a name of `RULER`.
        wording: what it is said in.
        count_tokens: how many tokens the prompt of an example and the longest answer to it are.
        length: how many they may be.
        seed, index: the same ones give the same example, however many others there are.
        task: another task than the one of that name.

    Raises:
        ValueError: if not even the smallest haystack is as short, or there are too few words or documents for one as
            long.
    """
    task = RULER[name] if task is None else task

    def make(size: int) -> tuple[Example, int]:
        example = task.make(name, wording, random.Random(f"{seed} {name} {index}"), size, index, length)
        return example, count_tokens(example)

    return fit_size(name, make, task.least, length)


def fit_size(name: str, make: Callable[[int], tuple[Made, int]], least: int, length: int) -> Made:
    """What `make` makes of as large a size as `length` tokens hold.

    Args:
        name: of what is made.
        make: `size -> (made, tokens)`.
        least: the smallest size.
        length: tokens that it may have.

    Raises:
        ValueError: if the smallest is too long, or what there is to make it of ends too early.
    """
    fits = least
    best, most = make(fits)
    if most > length:
        raise ValueError(f"{name} takes at least {most} tokens, and the context length is {length}")
    too_large, too_few_words = None, None
    while too_large is None or too_large - fits > 1:  # how tokens grow with the pieces is not known beforehand
        size = 2 * fits if too_large is None else (fits + too_large) // 2
        try:
            made, tokens = make(size)
        except ValueError as error:
            too_large, too_few_words = size, error
            continue
        if tokens > length:
            too_large = size
        else:
            best, most, fits = made, tokens, size
    if too_few_words is not None and most < 0.98 * length:
        raise ValueError(f"{name} of {length} tokens: {too_few_words}") from too_few_words
    return best
