"""Measures one cache on a few examples: what is answered, what it costs, and the loss on running text."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..cache import MergingDynamicCache
from ..model import cache_argument
from ..report import report_layers
from .config import Variant
from .example import Example
from .metrics import METRICS
from .ruler import RULER

MOST_FOLLOWING = 256  # tokens of a text that are predicted: logits of large vocabularies take much memory


@dataclass(frozen=True)
class Encoded:
    """An example in tokens: what is read into the cache before the fold, and what comes after it."""

    read: list[int]
    asked: list[int]

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
        context, question = example.context, example.question
        if self.chat:
            mark = "[question]"  # templates may strip what they are given of white space
            said = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": context + mark}],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=False,
            )
            context, after = said.rsplit(mark, 1)
            question += after
        read = ([] if self.chat else self.beginning) + self.tokens(context)
        asked = self.tokens(question + example.answer_prefix)
        if self.question_in_context:
            read, asked = read + asked[:-1], asked[-1:]
        return Encoded(read, asked)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text and no others."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @property
    def beginning(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        plain, whole = self.tokens("."), self.tokenizer(".").input_ids
        return next((whole[:n] for n in range(len(whole)) if whole[n : n + len(plain)] == plain), [])

    def length(self, example: Example) -> int:
        """Tokens of the prompt and of the longest answer."""
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
class Measurer:
    """A model and how it is asked; a batch of examples and a cache go in, numbers for each example come out.

    Bytes, seconds and counts are those of the batch, shared by its rows.

    Args:
        model: from here on generates greedily, whatever its own generation config says (penalties, beams …).
        encoder: turns examples into tokens.
    """

    model: PreTrainedModel
    encoder: Encoder

    def __post_init__(self) -> None:
        end = self.model.generation_config.eos_token_id
        greedy = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=self.encoder.pad_token)
        self.model.generation_config = greedy

    @torch.no_grad()
    def answers(self, asked: list[tuple[Example, Encoded]], variant: Variant) -> Iterator[dict[str, Any]]:
        """Read the contexts, fold, then ask: the score of each answer, and what the cache cost."""
        examples, encoded = zip(*asked, strict=True)
        device = self.model.device
        read, mask = self.encoder.pad([one.read for one in encoded], device)
        question, question_mask = self.encoder.pad([one.asked for one in encoded], device)
        cache, costs = self._prefill(read, mask, variant)
        prompt, whole_mask = torch.cat([read, question], dim=1), torch.cat([mask, question_mask], dim=1)
        most = max(example.max_new_tokens for example in examples)
        output, seconds = self._generate(prompt, whole_mask, cache, most)
        release(cache)
        for example, ids in zip(examples, output[:, prompt.shape[1] :], strict=True):
            prediction = self.encoder.tokenizer.decode(ids[: example.max_new_tokens], skip_special_tokens=True)
            yield {
                "score": METRICS[RULER[example.task].metric](prediction, example.answers),
                "prediction": prediction,
                "decoding_seconds": seconds / len(examples),
                **costs,
            }

    @torch.no_grad()
    def text(self, windows: list[list[int]], variant: Variant) -> Iterator[dict[str, Any]]:
        """Read the first seven eighths of each window, fold, then predict the tokens that follow, in one pass.

        Of each window: `loss`, the mean negative log-likelihood of those tokens, and `kl`, the mean divergence of their
        distributions from the full cache's, both in nats for a token.
        """
        ids = torch.tensor(windows, device=self.model.device)
        follow = min(MOST_FOLLOWING, ids.shape[1] // 8)
        read, follows = ids.split([ids.shape[1] - follow, follow], dim=1)
        logits = []
        for one in [Variant()] if variant.is_full else [Variant(), variant]:
            cache, costs = self._prefill(read, torch.ones_like(read), one)
            logits.append(self.model(follows, **cache_argument(cache)).logits[:, :-1])
            release(cache)
        for full, held, tokens in zip(logits[0], logits[-1], follows[:, 1:, None], strict=True):
            full, held = full.float().log_softmax(dim=-1), held.float().log_softmax(dim=-1)
            divergence = (full.exp() * (full - held)).sum(dim=-1).mean()
            yield {"loss": -held.gather(1, tokens).mean().item(), "kl": divergence.item(), **costs}

    def _prefill(self, ids: Tensor, mask: Tensor, variant: Variant) -> tuple[Cache, dict[str, float]]:
        """The cache that has read `ids` `[B, L]`, and what that cost each row."""
        cache = DynamicCache(config=self.model.config) if variant.is_full else variant.make_cache(self.model)
        # the one token that is generated is not in the cache: it would be fed to the next pass
        _, seconds = self._generate(ids, mask, cache, max_new_tokens=1)
        report, rows = report_layers(cache.layers), len(ids)
        folding = max(1, sum(layer.kind == "folding" for layer in report.layers))
        return cache, {
            "bytes": report.total.bytes_now / rows,
            "prefill_seconds": seconds / rows,
            "merged": report.total.tokens_merged / folding,
            "dropped": report.total.tokens_dropped / folding,
        }

    def _generate(self, ids: Tensor, mask: Tensor, cache: Cache, max_new_tokens: int) -> tuple[Tensor, float]:
        """What is generated, behind `ids` `[B, L]`, and the seconds it took."""
        started = clock(self.model.device)
        output = self.model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **cache_argument(cache))
        return output, clock(self.model.device) - started


def clock(device: torch.device) -> float:
    """Seconds, all work on the device being done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def release(cache: Cache) -> None:
    """Leave the model as it was before the cache."""
    if isinstance(cache, MergingDynamicCache):
        cache.release()
