"""Questions about documents, read from the files in which SQuAD and HotpotQA are published."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DocumentQuestion:
    """A question, the answers that count as right, and the documents that hold them.

    Args:
        text: the question.
        answers: any of them is right.
        own: indices of the documents that hold the answer (and of those that the question came with).
        related: indices of documents like these, the first to be taken as distractors.
    """

    text: str
    answers: list[str]
    own: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class Quiz:
    """Documents and questions about them."""

    documents: Sequence[str]
    questions: Sequence[DocumentQuestion]


def read_squad(path: Path) -> Quiz:
    """SQuAD 2.0 (arXiv:1806.03822): paragraphs of articles; the questions that have no answer are left out.

    Raises:
        ValueError: if the file cannot be read as such.
    """

    def parse(data: Any) -> Quiz:
        documents = sorted({paragraph["context"] for article in data["data"] for paragraph in article["paragraphs"]})
        index = {document: number for number, document in enumerate(documents)}
        questions = []
        for article in data["data"]:
            of_article = [index[paragraph["context"]] for paragraph in article["paragraphs"]]
            for paragraph in article["paragraphs"]:
                own = index[paragraph["context"]]
                related = tuple(number for number in of_article if number != own)
                questions += [
                    DocumentQuestion(
                        asked["question"], [answer["text"] for answer in asked["answers"]], (own,), related
                    )
                    for asked in paragraph["qas"]
                    if not asked.get("is_impossible") and asked["answers"]
                ]
        return Quiz(documents, questions)

    return _read(path, "SQuAD 2.0", parse)


def read_hotpotqa(path: Path) -> Quiz:
    """HotpotQA, distractor setting (arXiv:1809.09600): paragraphs of Wikipedia, of which two hold the answer.

    Raises:
        ValueError: if the file cannot be read as such.
    """

    def parse(data: Any) -> Quiz:
        texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]] for asked in data]
        documents = sorted({text for of_question in texts for text in of_question})
        index = {document: number for number, document in enumerate(documents)}
        questions = [
            DocumentQuestion(asked["question"], [asked["answer"]], tuple(index[text] for text in of_question))
            for asked, of_question in zip(data, texts, strict=True)
        ]
        return Quiz(documents, questions)

    return _read(path, "HotpotQA", parse)


def _read(path: Path, name: str, parse: Callable[[Any], Quiz]) -> Quiz:
    try:
        quiz = parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} could not be read as {name} in JSON: {type(error).__name__}: {error}") from error
    if not quiz.questions:
        raise ValueError(f"{path} holds no question that has an answer")
    return quiz
