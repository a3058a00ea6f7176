"""Long-context questions in plain words: what the needle model is trained on and asked.

One context hides three kinds of facts among filler sentences: codes of names, one marked passage, and votes. Every
question is a sentence to complete, asked after the context, so a cache folded at the end of the context cannot know
which one will come. All text is lower-case words separated by single spaces, readable by any language model.
"""

import random
from dataclasses import dataclass

from merging_cache.evaluation.needle_words import CODES, NAMES, filler_sentence

KINDS = {
    "multi-key": "look-up",
    "copy": "copy",
    "frequent": "top 3",
}  # of questions about one context, as tables say it


@dataclass(frozen=True)
class Question:
    """A sentence to complete after the context, and the words that complete it."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Context:
    """`text` of about `words` words, and everything that can be asked about it."""

    text: str
    questions: list[Question]


def make_context(rng: random.Random, words: int, pairs: int, passage: int = 12, candidates: int = 8) -> Context:
    """A context of at least `words` words.

    It holds `pairs` names with a code each, one marked passage of `passage` names (none where 0), and votes for
    `candidates` names (none where 0), of which three are voted for clearly more often than the rest.
    """
    names = rng.sample(NAMES, pairs + passage + candidates)
    keys, marked, voted = names[:pairs], names[pairs : pairs + passage], names[pairs + passage :]
    values = rng.sample(CODES, pairs)
    facts = [["code", key, value, "."] for key, value in zip(keys, values, strict=True)]
    questions = [
        Question("multi-key" if pairs > 1 else "single", f"question : code {key}", value)
        for key, value in zip(keys, values, strict=True)
    ]
    if passage:
        facts.append(["the", "passage", "begins", *marked, "end", "."])
        questions.append(Question("copy", "question : the passage begins", " ".join([*marked, "end"])))
    if candidates:
        step = rng.randint(2, 4) if words > 300 else rng.randint(2, 3)
        counts = [1 + 3 * step, 1 + 2 * step, 1 + step] + [1] * (candidates - 3)
        facts += [["vote", "for", name, "."] for name, count in zip(voted, counts, strict=True) for _ in range(count)]
        questions.append(Question("frequent", "question : the three most common votes are", " ".join(voted[:3])))

    fillers, length = [], sum(map(len, facts))
    while length < words:
        fillers.append(filler_sentence(rng).split())
        length += len(fillers[-1])
    sentences = facts + fillers
    rng.shuffle(sentences)
    return Context(" ".join(word for sentence in sentences for word in sentence), questions)


def pick_questions(rng: random.Random, context: Context, lookups: int) -> list[Question]:
    """Some of the look-ups of a context and all its other questions."""
    by_kind = {kind: [q for q in context.questions if q.kind == kind] for kind in KINDS}
    picked = rng.sample(by_kind["multi-key"], min(lookups, len(by_kind["multi-key"])))
    return picked + by_kind["copy"] + by_kind["frequent"]


def held_out(rng: random.Random, kind: str, words: int = 512) -> tuple[str, Question]:
    """One held-out example of `kind` ("single", "multi-key", "copy", "frequent") over at least `words` words."""
    context = make_context(rng, words, pairs={"single": 1, "multi-key": 24}.get(kind, 8))
    return context.text, rng.choice([question for question in context.questions if question.kind == kind])


def score(question: Question, completion: str) -> float:
    """Fraction of `question.answer` that `completion` gives: the words in place, for votes the names in any order."""
    expected = question.answer.split()
    given = [word.strip(".,:;") for word in completion.lower().split()][: len(expected)]
    if question.kind == "frequent":
        return len(set(expected) & set(given)) / len(expected)
    return sum(a == b for a, b in zip(expected, given, strict=False)) / len(expected)
