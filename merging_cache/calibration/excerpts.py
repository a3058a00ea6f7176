"""The texts that a model reads when it is calibrated: stretches of several lengths, half of them inside a chat."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

HELD_OUT = 0.15  # of the text, its end, on which what was fitted is judged


@dataclass(frozen=True)
class Excerpt:
    """One stretch of text.

    Args:
        input_ids: `[1, L]`.
        is_held_out: whether gates are judged by it, and not fitted.
        is_in_chat: whether it stands in the chat template.
    """

    input_ids: Tensor
    is_held_out: bool
    is_in_chat: bool = False


def excerpts_of(
    text: str, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], tokens_of_length: int, seed: int
) -> list[Excerpt]:
    """Excerpts of each length, `tokens_of_length` tokens of it in all, and of each one more that is held out.

    They come in an order in which the first tell of all lengths. Every other one stands in the model's chat template,
    where there is one. Held-out ones are as long as the text that is held out, at most.

    Raises:
        ValueError: for a text that is too short for an excerpt of the longest.
    """
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    first_held_out = int(len(ids) * (1 - HELD_OUT))
    if first_held_out < max(lengths):
        raise ValueError(
            f"the text has {len(ids)} tokens, of which the last {HELD_OUT:.0%} are held out; that is too short for "
            f"excerpts of {max(lengths)} tokens. Give a longer text, or shorter lengths"
        )
    rng = random.Random(f"calibration {seed}")
    plan = []
    for length in lengths:
        count = max(1, tokens_of_length // length)
        plan += [((number + rng.random()) / count, length, False) for number in range(count)]
        plan.append((rng.random(), length, True))
    frames = (_frame(tokenizer, in_chat=False), _frame(tokenizer, in_chat=True))
    excerpts = []
    for number, (_, length, held_out) in enumerate(sorted(plan)):
        part, frame = ids[first_held_out:] if held_out else ids[:first_held_out], frames[number % 2]
        excerpts.append(Excerpt(_cut(part, length, *frame, rng), held_out, is_in_chat=frame != frames[0]))
    return excerpts


def _cut(ids: list[int], length: int, before: list[int], after: list[int], rng: random.Random) -> Tensor:
    """`[1, length]`, less where there are no more ids, with what stands before and after it."""
    room = min(len(ids), max(1, length - len(before) - len(after)))
    start = rng.randint(0, len(ids) - room)
    return torch.tensor([(before + ids[start : start + room] + after)[:length]])


def _frame(tokenizer: PreTrainedTokenizerBase, in_chat: bool) -> tuple[list[int], list[int]]:
    """The ids that stand before and after a text; without a chat where the template cannot say it."""
    mark = "\u2603"
    if in_chat and getattr(tokenizer, "chat_template", None):
        asked: Any = [{"role": "user", "content": mark}]
        try:
            parts = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True).split(mark)
        except Exception:  # templates are programs of others, and raise what they like
            parts = []
        if len(parts) == 2:
            return tuple(tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    start = tokenizer.bos_token_id
    return ([] if start is None or tokenizer("a")["input_ids"][:1] != [start] else [start]), []
