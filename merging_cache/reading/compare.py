"""compare: what each of several caches would lose on a prompt of one's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..cache import MergingDynamicCache
from ..config import MergingConfig
from ..quantized_cache import MergingQuantizedCache
from ..report import align, report_layers
from ..stage import check_number
from .continuation import Continuation, answer, divergence, loss, predict, release
from .reading import Reading, check_length, clock

FULL = "full cache"
COLUMNS = ("cache", "loss", "divergence", "agrees", "bytes", "share", "fold, s")


@dataclass(frozen=True)
class ComparedCache:
    """What one cache would lose.

    Args:
        name: how it folds.
        loss: mean negative log-likelihood of what follows, in nats for a token; compare it with the full cache's.
        divergence: mean Kullback-Leibler divergence of its predictions from the full cache's, in nats for a token.
        agreement: at how many of the tokens its likeliest one is the full cache's, as a share.
        nbytes: bytes that it holds after the prompt.
        share: the same as a share of the full cache's.
        fold_seconds: what filling the cache took, scoring, choosing and merging included, on top of the prefill.
    """

    name: str
    loss: float
    divergence: float
    agreement: float
    nbytes: int
    share: float
    fold_seconds: float

    def cells(self) -> list[str]:
        """The row of the table."""
        numbers = (f"{self.loss:.3f}", f"{self.divergence:.4f}", f"{self.agreement:.0%}")
        return [self.name, *numbers, f"{self.nbytes:,}", f"{self.share:.3f}", f"{self.fold_seconds:.3f}"]


@dataclass(frozen=True)
class Comparison:
    """What several caches would lose on one prompt; `print` it for a table.

    Args:
        caches: the full one first, then those that were given, in their order.
        num_tokens: of the prompt.
        predicted: of what follows: those that losses are means over.
        answer: what follows, where the full cache wrote it itself.
    """

    caches: tuple[ComparedCache, ...]
    num_tokens: int
    predicted: int
    answer: str | None = None

    def __str__(self) -> str:
        head, *lines = align([list(COLUMNS), *(one.cells() for one in self.caches)], left=1)
        said = f"{self.num_tokens:,} tokens read, then {self.predicted} that follow"
        if self.answer is not None:
            said += f", the full cache's own answer: {self.answer.strip()!r}"
        return "\n".join([said, "", head, "-" * len(head), *lines])


@torch.no_grad()
def compare(
    model: PreTrainedModel,
    prompt: str | Sequence[Mapping[str, str]] | Tensor,
    configs: Sequence[MergingConfig | Mapping[str, Any] | str | Path | Cache],
    *,
    question: str | Tensor | None = None,
    following: str | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 64,
    chunk_size: int | None = None,
    progress: bool = True,
) -> Comparison:
    """What each of several caches would lose on a prompt of one's own, which is read once for all of them.

    Args:
        model: a causal language model.
        prompt: a text, the messages of a conversation (which go through the tokenizer's chat template), or ids
            `[1, L]`: what a cache reads and folds.
        configs: how to fold: what `MergingDynamicCache(merging=...)` takes, or empty caches of any kind.
        question: more of the prompt, which is read after the fold; by default nothing is. That of a conversation is the
            end of its last message.
        following: the text whose loss is taken; by default the answer that the full cache generates.
        tokenizer: the model's; by default it is loaded from where the model came from.
        max_new_tokens: how long that answer may be.
        chunk_size: read the prompt so many tokens at a time, to save memory.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for an empty prompt or following text, one that is longer than the model allows, where there is
            nothing to compare, and for options a cache does not take.
        TypeError: for a prompt or a config of another kind.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from merging_cache import compare
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=64,
        ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))
        >>> text = torch.arange(1, 97)[None]
        >>> configs = [{"scorer": name, "compression_ratio": 0.75} for name in ("keydiff", "snapkv", "knorm")]
        >>> found = compare(model, text[:, :80], configs, following=text[:, 80:], progress=False)
        >>> [one.name for one in found.caches if one.loss > 0 and one.agreement > 0.5]
        ['full cache', 'keydiff auto 75%', 'snapkv auto 75%', 'knorm auto 75%']
    """
    check_number("max_new_tokens", max_new_tokens, int, minimum=2)
    if isinstance(configs, str | Mapping) or not isinstance(configs, Sequence) or not configs:
        raise TypeError(f"configs is {configs!r}; give a list of configs, dicts, paths or caches")
    for one in configs:  # what is wrong is said before anything is read
        if not isinstance(one, Cache):
            release(make_cache(model, one))
        elif one.get_seq_length():
            raise ValueError(f"a {type(one).__name__} to compare is not empty; give new ones, or call reset() before")
    tokens = Tokens(model, tokenizer)
    if isinstance(question, str) and is_conversation(prompt):
        prompt_ids, asked = tokens.asked_within(prompt, question)
    else:
        prompt_ids = tokens.of(prompt, "prompt", begins=True)
        asked = [] if question is None else tokens.of(question, "question")[0].tolist()
    follows = None if following is None else tokens.of(following, "following")[0].tolist()
    if follows is not None:
        check_follows(model, prompt_ids, asked, follows)
    with tqdm(total=len(configs) + 2, desc="comparing", unit="cache", disable=not progress) as steps:
        reading = Reading(model, prompt_ids.to(model.device), chunk_size=chunk_size, progress=False)
        steps.update()
        full = reading.fill(DynamicCache(config=model.config))
        said = None
        if follows is None:
            follows = generate(model, reading, prompt_ids, asked, max_new_tokens)
            said = tokens.decoded(follows)
            check_follows(model, prompt_ids, asked, follows)
        if not asked:  # the first token comes of the prefill, whatever the cache: the others of the cache
            asked, follows = follows[:1], follows[1:]
        wanted = Continuation(asked, follows)
        (expected,) = predict(model, full, [wanted])
        full_bytes = report_layers(full.layers).total.bytes_now
        rows = [ComparedCache(FULL, loss(expected, follows), 0.0, 1.0, full_bytes, 1.0, 0.0)]
        steps.update()
        for one in configs:
            cache = make_cache(model, one)
            started = clock(model.device)
            reading.fill(cache)
            if isinstance(cache, MergingDynamicCache):
                cache.fold()  # one that would wait for the first single token would be measured unfolded
            seconds = clock(model.device) - started
            (found,) = predict(model, cache, [wanted])
            nbytes = report_layers(cache.layers).total.bytes_now
            same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
            losses = loss(found, follows), divergence(found, expected)
            rows.append(ComparedCache(name_of(cache), *losses, same, nbytes, nbytes / full_bytes, seconds))
            release(cache)
            steps.update()
    names = [row.name for row in rows]
    for number, name in enumerate(names):
        if names.count(name) > 1:  # options that are not in it, or config= beside model=
            rows[number] = replace(rows[number], name=f"{name} ({names[: number + 1].count(name)})")
    return Comparison(tuple(rows), prompt_ids.shape[1], len(follows), said)


def check_follows(model: PreTrainedModel, prompt: Tensor, asked: list[int], follows: list[int]) -> None:
    """Refuse what is too short to tell caches apart, and what is longer than the model allows."""
    if len(follows) + bool(asked) < 2:
        raise ValueError("what follows is a single token, which no cache has a part in; give a longer text")
    check_length(model, prompt.shape[1] + len(asked) + len(follows))


def make_cache(model: PreTrainedModel, one: Any) -> Cache:
    """The empty cache that is meant."""
    if isinstance(one, Cache):
        return one
    if not isinstance(one, MergingConfig | Mapping | str | Path):
        raise TypeError(f"configs holds {one!r}; give a MergingConfig, a dict, a path to its JSON file, or a cache")
    return MergingDynamicCache(model=model, merging=one)


def name_of(cache: Cache) -> str:
    """How a cache folds, in a few words."""
    if not isinstance(cache, MergingDynamicCache):
        return type(cache).__name__
    quantized = f" {cache.backend_name}" if isinstance(cache, MergingQuantizedCache) else ""
    return cache.merging.label + quantized


def generate(model: PreTrainedModel, reading: Reading, prompt: Tensor, asked: list[int], most: int) -> list[int]:
    """What the model greedily answers with the full cache, to the prompt or to what is asked behind it."""
    first = [] if asked else [int(reading.logits[0].argmax())]  # it comes of the prefill
    ends = model.generation_config.eos_token_id
    if first and first[0] in (ends if isinstance(ends, list) else [ends]):
        raise ValueError("the full cache answers this prompt with nothing; give the text that is to follow")
    ids = torch.cat([prompt, torch.tensor([asked or first], dtype=prompt.dtype)], dim=1).to(model.device)
    cache = reading.fill(DynamicCache(config=model.config))
    return first + answer(model, cache, ids, max_new_tokens=most - len(first))[0].tolist()


def is_conversation(given: Any) -> bool:
    """Whether something is the messages of a conversation."""
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(one, Mapping) for one in given)


def around_question(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], **options: Any
) -> tuple[str, str]:
    """What a chat template says up to the end of the last message, where a question goes on, and what follows it."""
    mark = "[question]"  # templates may strip what they are given of white space
    *before, last = messages
    marked = [*before, {**last, "content": last["content"] + mark}]
    said = tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False, **options)
    context, after = said.rsplit(mark, 1)
    return context, after


class Tokens:
    """Turns what a user gives into ids.

    Args:
        model: whose tokenizer is loaded when it is first needed.
        tokenizer: or this one.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.model = model
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's.

        Raises:
            ValueError: if there is none where the model came from.
        """
        if self._tokenizer is None:
            name = self.model.config._name_or_path
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError, TypeError) as error:
                raise ValueError(
                    f"a text is given, and there is no tokenizer at {name!r}, where the model came from; give "
                    "tokenizer=..., or ids"
                ) from error
        return self._tokenizer

    def of(self, given: Any, what: str, begins: bool = False) -> Tensor:
        """`[1, L]`; with the special tokens that a text begins with if it `begins`."""
        if isinstance(given, str):
            ids = self.tokenizer(given, add_special_tokens=begins, return_tensors="pt").input_ids.long()
        elif begins and is_conversation(given):
            ids = self.tokenizer.apply_chat_template(
                list(given), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
        elif isinstance(given, Tensor) and given.dim() == 2 and len(given) == 1 and not given.is_floating_point():
            ids = given.cpu()
        else:
            came = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
            raise TypeError(
                f"{what} is {came}; give a text{', messages' if begins else ''} or ids of shape (1, tokens)"
            )
        if not ids.shape[1]:
            raise ValueError(f"{what} is empty: {given!r} has no token")
        return ids

    def asked_within(self, messages: Sequence[Mapping[str, str]], question: str) -> tuple[Tensor, list[int]]:
        """The ids `[1, L]` of a conversation up to the end of its last message, and of what comes after them.

        The question belongs to that message, so the template goes on behind it.
        """
        context, after = around_question(self.tokenizer, messages)
        encoded = [self.tokenizer(text, add_special_tokens=False).input_ids for text in (context, question + after)]
        return torch.tensor([encoded[0]]), encoded[1]

    def decoded(self, ids: list[int]) -> str:
        """As text, or as the ids where there is no tokenizer."""
        try:
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        except ValueError:
            return " ".join(map(str, ids))
