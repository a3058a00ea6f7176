"""How many tokens a cache has seen, as a number that catches a prompt with none to add."""


class TokensSeen(int):
    """A count of seen tokens.

    `generate` takes the last `len(prompt) - seen` tokens of a prompt as the new ones, by `input_ids[:, -new:]`. For a
    prompt no longer than what the cache has seen that slice is silently something else, and a cache is told nothing but
    the keys that come of it. So the difference refuses to become the start of a slice.

    Phi-3 and its kin rotate otherwise from a length on, and have `generate` go on without the cache, and with all
    tokens, where that is crossed: if the tokens seen are no more than that length. So that comparison is refused, too.

    Args:
        count: the tokens.
        switches_at: that length, where there is one and it must not be crossed.
    """

    switches_at: int | None

    def __new__(cls, count: int, switches_at: int | None = None) -> "TokensSeen":
        number = super().__new__(cls, count)
        number.switches_at = switches_at
        return number

    def __le__(self, other: int) -> bool:
        if 0 < int(self) <= other == self.switches_at:
            raise ValueError(
                f"This model rotates its keys otherwise from {other} tokens on, and this cache holds {int(self)} that "
                "came before, some of them folded: they cannot be rotated again, and generate() would go on without "
                f"the cache. Generate up to {other} tokens in all, give a prompt that is longer at once, or take "
                "compression_ratio=0"
            )
        return int(self) <= other

    def __rsub__(self, length: int) -> int:
        new = int(length) - int(self)
        return new if new > 0 else NoNewTokens(new, length, self)


class NoNewTokens(int):
    """A difference `length - seen` that is not positive: an ordinary number, except that it cannot be negated."""

    def __new__(cls, value: int, length: int, seen: int) -> "NoNewTokens":
        number = super().__new__(cls, value)
        number.length, number.seen = int(length), int(seen)
        return number

    def __neg__(self) -> int:
        raise ValueError(
            f"The prompt has {self.length} tokens, but this cache has already seen {self.seen}. Pass the "
            "whole conversation, which must be longer, or only its new tokens (ids or embeddings) with an attention "
            "mask over all of it, or call cache.reset() to start another one."
        )
