"""Measures one cache after another on contexts that were read once: what is answered, how surely, and what it costs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..reading import (
    Continuation,
    Reading,
    agrees,
    answer,
    around_question,
    clock,
    divergence,
    loss,
    predict,
    release,
    rows_of,
)
from ..report import report_layers
from .config import Variant
from .example import Example
from .metrics import METRICS
from .tasks import TASKS


@dataclass(frozen=True)
class Encoded:
    """An example in tokens: what is read before the fold, what comes after it, and a right answer."""

    read: list[int]
    asked: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.read) + len(self.asked)


@dataclass(frozen=True)
class Encoder:
    """Turns examples into tokens.

    Args:
        tokenizer: of the model.
        chat: whether to go through its chat template.
        question_in_context: whether the question is read with the context; all but its last token, which starts the
            answer.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool = False
    question_in_context: bool = False

    def __call__(self, example: Example) -> Encoded:
        context, question = example.context, example.question or ""
        if self.chat:
            message = {"role": "user", "content": context}
            context, after = around_question(self.tokenizer, [message], enable_thinking=False)
            question += "" if example.question is None else after
        read = ([] if self.chat else self.beginning) + self.tokens(context)
        asked = self.tokens(question + example.answer_prefix)
        whole = self.tokens(question + example.answer_prefix + example.reference)
        answer = whole[len(asked) :] if whole[: len(asked)] == asked else self.tokens(example.reference)
        if self.question_in_context and example.question is not None:
            read, asked = read + asked[:-1], asked[-1:]
        return Encoded(read, asked, answer)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text and no others."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @property
    def beginning(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        plain, whole = self.tokens("."), self.tokenizer(".").input_ids
        return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(plain)] == plain), [])

    def length(self, example: Example) -> int:
        """Tokens of the prompt and of the longest answer that is generated."""
        return len(self(example)) + example.max_new_tokens

    @property
    def pad_token(self) -> int:
        """What rows are padded with."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else end if end is not None else 0

    def pad(self, rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """`[B, L]` ids and mask, padded on the left."""
        longest = max(map(len, rows))
        ids = [[self.pad_token] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@dataclass(frozen=True)
class Item:
    """What is asked about one context for one task.

    Args:
        task, context_length, index: which example of which task.
        examples: a question each.
        encoded: the same in tokens.
    """

    task: str
    context_length: int
    index: int
    examples: Sequence[Example]
    encoded: Sequence[Encoded]

    @property
    def reads(self) -> list[tuple[int, ...]]:
        """What is to be read for each question; the same for all unless questions are read, too."""
        return [tuple(one.read) for one in self.encoded]


@dataclass(frozen=True)
class Batch:
    """Contexts that are read at a time, each once, and all that is asked about them.

    Args:
        rows: the tokens of each context.
        items: what is asked.
    """

    rows: list[tuple[int, ...]]
    items: list[Item]

    @property
    def num_tokens(self) -> int:
        """Of the longest row."""
        return max(map(len, self.rows))


def batches_of(items: Sequence[Item], most_rows: int) -> list[Batch]:
    """Items as they are measured together: those of one context share it, then contexts of like lengths."""
    sharing: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        sharing.setdefault(tuple(dict.fromkeys(item.reads)), []).append(item)
    by_length = sorted(sharing.items(), key=lambda entry: max(map(len, entry[0])))
    batches: list[Batch] = []
    for rows, sharers in by_length:
        last = batches[-1] if batches else None
        alike = last is not None and last.items[0].context_length == sharers[0].context_length
        if alike and len(last.rows) + len(rows) <= most_rows:
            last.rows.extend(rows)
            last.items.extend(sharers)
        else:
            batches.append(Batch(list(rows), list(sharers)))
    # in the order of the examples, so that a run that is stopped has measured all tasks alike
    return sorted(batches, key=lambda batch: (batch.items[0].context_length, min(item.index for item in batch.items)))


@dataclass
class Measurer:
    """A model and how it is asked.

    Args:
        model: from here on generates greedily, whatever its own generation config says (penalties, beams …).
        encoder: turns examples into tokens.
        generates: whether tasks that look through a generated answer get one.
    """

    model: PreTrainedModel
    encoder: Encoder
    generates: bool = True

    def __post_init__(self) -> None:
        end = self.model.generation_config.eos_token_id
        greedy = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=self.encoder.pad_token)
        self.model.generation_config = greedy

    def read(self, batch: Batch, hidden_states: bool = True) -> "Questioned":
        """Read a batch's contexts."""
        ids, mask = self.encoder.pad([list(row) for row in batch.rows], self.model.device)
        reading = Reading(self.model, ids, mask, hidden_states=hidden_states, progress=False)
        return Questioned(self, batch, ids, mask, reading)


@dataclass
class Questioned:
    """Contexts that were read, and what is asked about them, of one cache after another.

    Bytes, seconds and counts are those of the batch, shared by its rows.

    Args:
        measurer: the model, and how it is asked.
        batch: the contexts, and the questions.
        ids, mask: `[B, L]`, the contexts.
        reading: of them.
    """

    measurer: Measurer
    batch: Batch
    ids: Tensor
    mask: Tensor
    reading: Reading
    full: list[list[Tensor]] | None = None  # what the full cache predicts, once it was asked

    def measure(self, variant: Variant) -> Iterator[tuple[Item, dict[str, Any]]]:
        """What was measured of each item with a cache.

        `score` in [0, 1], whether answers are right (or parts of them, see `metrics.py`); `loss`, the mean negative
        log-likelihood of the reference answers, and `kl`, the mean divergence of the distributions at its tokens from
        the full cache's, both in nats for a token, questions counting alike; and what the cache cost.
        """
        cache, seconds = self._fill(variant)
        costs = self._costs(cache, seconds)
        generated = self._generate(cache) if self.measurer.generates else {}
        predicted = self._predict(cache)
        if variant.is_full:
            self.full = predicted
        elif self.full is None:  # of a run that goes on, or a rehearsal
            self.full = self._predict(self._fill(Variant())[0])
        for number, (item, mine, full) in enumerate(zip(self.batch.items, predicted, self.full, strict=True)):
            answers = [one.answer for one in item.encoded]
            measured = {
                "score": mean([float(agrees(*pair)) for pair in zip(mine, answers, strict=True)]),
                "loss": mean([loss(*pair) for pair in zip(mine, answers, strict=True)]),
                "kl": mean([divergence(*pair) for pair in zip(mine, full, strict=True)]),
            }
            yield item, measured | generated.get(number, {}) | costs
        release(cache)

    def _fill(self, variant: Variant) -> tuple[Cache, float]:
        """A cache that has read the contexts, and the seconds that filling it took."""
        model = self.measurer.model
        cache = DynamicCache(config=model.config) if variant.is_full else variant.make_cache(model)
        self.reading.fill(cache)
        return cache, self.reading.fill_seconds

    def _predict(self, cache: Cache) -> list[list[Tensor]]:
        """What a cache predicts at the tokens of each item's answers, see `predict`."""
        rows = self.batch.rows
        asked = (
            [Continuation(one.asked, one.answer, rows.index(tuple(one.read))) for one in item.encoded]
            for item in self.batch.items
        )
        return [predict(self.measurer.model, cache, one, self.mask, len(self.ids)) for one in asked]

    def _costs(self, cache: Cache, fold_seconds: float) -> dict[str, float]:
        report, rows = report_layers(cache.layers), len(self.batch.rows)
        folding = max(1, sum(layer.kind == "folding" for layer in report.layers))
        return {
            "bytes": report.total.bytes_now / rows,
            "reading_seconds": self.reading.seconds / rows,
            "fold_seconds": fold_seconds / rows,
            "merged": report.total.tokens_merged / folding,
            "dropped": report.total.tokens_dropped / folding,
        }

    def _generate(self, cache: Cache) -> dict[int, dict[str, Any]]:
        """The answers of the tasks that want them generated: their scores by the number of the item."""
        numbers = [number for number, item in enumerate(self.batch.items) if TASKS[item.task].generates]
        # a question that is padded would give its row more slots when it is folded
        numbers.sort(key=lambda number: len(self.batch.items[number].encoded[0].asked))
        found = {}
        for _, group in groupby(numbers, key=lambda number: len(self.batch.items[number].encoded[0].asked)):
            alike = list(group)
            items = [self.batch.items[number] for number in alike]
            predictions, seconds = self._answers(cache, items)
            for number, item, prediction in zip(alike, items, predictions, strict=True):
                found[number] = {
                    "score": METRICS[TASKS[item.task].metric](prediction, item.examples[0].answers),
                    "prediction": prediction,
                    "decoding_seconds": seconds / len(items),
                }
        return found

    def _answers(self, cache: Cache, items: Sequence[Item]) -> tuple[list[str], float]:
        """What is generated for the one question of each item, and the seconds it took."""
        model, encoder = self.measurer.model, self.measurer.encoder
        rows = [self.batch.rows.index(tuple(item.encoded[0].read)) for item in items]
        question = torch.tensor([item.encoded[0].asked for item in items], device=model.device)
        prompt = torch.cat([self.ids[rows], question], dim=1)
        mask = torch.cat([self.mask[rows], torch.ones_like(question)], dim=1)
        own = rows_of(cache, rows, len(self.ids), folds=True)
        most = max(item.examples[0].max_new_tokens for item in items)
        started = clock(model.device)
        output = answer(model, own, prompt, mask, max_new_tokens=most)
        seconds = clock(model.device) - started
        release(own)
        answers = [
            encoder.tokenizer.decode(ids[: item.examples[0].max_new_tokens], skip_special_tokens=True)
            for item, ids in zip(items, output, strict=True)
        ]
        return answers, seconds


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)
