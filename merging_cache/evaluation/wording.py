"""What a task is said in: words, sentences and frames. How a task is built from them is no business of theirs.

`English` says RULER's tasks as RULER says them, `NeedleWords` in the few hundred words of the shipped model.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .documents import Quiz
from .example import Example


@dataclass(frozen=True)
class Fact:
    """Something to be remembered: a sentence, a question about it, how the answer begins, and the rest of it."""

    sentence: str
    question: str
    answer_prefix: str
    answer: str


@dataclass(frozen=True)
class Frame:
    """How a kind of task speaks: `{text}` stands for what it hides things in.

    Args:
        context: what is read first.
        question: what is asked after it.
        answer_prefix: the beginning of the answer, given to the model.
        max_new_tokens: how long the answer may be.
        between: what stands between the answers, where several are right together.
    """

    context: str
    question: str
    answer_prefix: str
    max_new_tokens: int
    between: str = ", "

    def fill(
        self, task: str, answers: list[str], depths: tuple[float, ...] = (), any_is_right: bool = False, **words: object
    ) -> Example:
        """The example of a task, with these words in place."""
        context, question, prefix = (part.format(**words) for part in (self.context, self.question, self.answer_prefix))
        reference = self.reference(prefix, answers, any_is_right)
        return Example(task, context, question, prefix, answers, self.max_new_tokens, depths, reference)

    def reference(self, prefix: str, answers: Sequence[str], any_is_right: bool = False) -> str:
        """A right answer as it stands behind its beginning."""
        given = answers[0] if any_is_right else self.between.join(answers)
        return given if prefix.endswith(" ") else f" {given}"


class Wording(ABC):
    """The words of a family of tasks.

    Attributes:
        frames: by kind of task: `"niah"` (one key, one value), `"niah values"` (several values of a key),
            `"niah queries"` (several keys), `"vt"`, `"cwe"`, `"fwe"`, `"qa"`, `"fact"`, `"quotation"`.
        noise_line: the sentences that are repeated where a haystack is noise.
        line_break: what stands between the lines of a haystack.
        coded_noise: the most frequent word of a coded text, which is not asked for.
        repeats: how often common and uncommon words appear in a list, for contexts of less than so many tokens.
        solved_examples: whether variable tracking and common words come with an example that is answered.
    """

    frames: Mapping[str, Frame]
    noise_line: Sequence[str]
    line_break: str
    coded_noise: str
    repeats: Sequence[tuple[int, tuple[int, int]]]
    solved_examples: bool = False

    @abstractmethod
    def draw(self, kind: str, rng: random.Random, count: int) -> list[str]:
        """`count` different `"words"`, `"numbers"` or `"uuids"`."""

    @abstractmethod
    def needle(self, kind: str, key: str, value: str) -> str:
        """The sentence that says that `value`, of this kind, is that of `key`."""

    @abstractmethod
    def prose(self, rng: random.Random, size: int) -> list[str]:
        """About `size` words of running text, sentence by sentence."""

    @abstractmethod
    def stretch(
        self, size: int, following: int, length: int, seed: int, index: int
    ) -> tuple[list[list[str]], list[str]]:
        """About `size` words of running text, sentence by sentence, and the `following` words after them.

        Args:
            length: tokens that the text may have, which no two stretches share for one seed.
            seed, index: which stretch.
        """

    @abstractmethod
    def facts(self, rng: random.Random, count: int) -> list[Fact]:
        """`count` different facts that stand in no prose."""

    @abstractmethod
    def variables(self, rng: random.Random, count: int, letters: int) -> list[str]:
        """`count` different names of variables, of as many letters where names are letters."""

    @abstractmethod
    def number(self, rng: random.Random) -> str:
        """A number for a variable to hold."""

    @abstractmethod
    def assignment(self, variable: str, value: str) -> str:
        """The statement that gives `variable` a number, or what another variable holds."""

    @abstractmethod
    def list_words(self, rng: random.Random, count: int) -> list[str]:
        """`count` different words for a list."""

    @abstractmethod
    def word_list(self, words: Sequence[str]) -> str:
        """The words as a list."""

    @abstractmethod
    def coded_words(self, rng: random.Random, count: int) -> list[str]:
        """`count` different coded words."""

    @abstractmethod
    def query(self, keys: Sequence[str]) -> str:
        """One key or several, as a question names them."""

    @abstractmethod
    def quiz(self, source: str, rng: random.Random, size: int) -> Quiz:
        """Questions about documents, `"squad"` (one fact) or `"hotpotqa"` (two), of `size` words or more in all."""

    @abstractmethod
    def documents(self, texts: Sequence[str]) -> str:
        """Documents one after another."""

    def has(self, material: str | None) -> bool:
        """Whether there is what a task needs besides words (`Task.needs`)."""
        return True

    def noise(self, size: int) -> list[str]:
        """`size` sentences of noise, line by line."""
        per_line = len(self.noise_line)
        return [" ".join(self.noise_line[: min(per_line, size - start)]) for start in range(0, size, per_line)]

    def repeats_at(self, length: int) -> tuple[int, int]:
        """How often common and uncommon words appear in a list for a context of `length` tokens."""
        return next(repeats for less_than, repeats in self.repeats if length < less_than)


def distinct(count: int, draw: Callable[[], str]) -> list[str]:
    """`count` different strings."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[draw()] = None
    return list(drawn)


def sample(rng: random.Random, words: Sequence[str], count: int, what: str) -> list[str]:
    """`count` different words of a list.

    Raises:
        ValueError: if there are not so many.
    """
    if count > len(words):
        raise ValueError(f"{count} different {what} are needed and there are {len(words)}; ask for shorter contexts")
    return rng.sample(words, count)
