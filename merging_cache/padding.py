"""Which tokens of the batch are padding: the one record of it, shared by all layers of a cache."""

import warnings

import torch
from torch import Tensor


class Padding:
    """The attention mask of a cache's batch.

    A cache sees keys and values only, so padding has to be told. A mask of fewer rows than the batch stands for beams
    or several sequences per prompt: every row is repeated, as `generate` repeats its inputs. Columns beyond the mask's
    width are real tokens.
    """

    def __init__(self, attention_mask: Tensor | None = None) -> None:
        self._mask: Tensor | None = None  # [rows, columns] bool, True for padding; None where no token is padding
        self._given = False
        self._warned = False
        self.set(attention_mask)

    def set(self, attention_mask: Tensor | None) -> None:
        """Take a mask `[rows, columns]` as tokenizers give it: 1 for tokens, 0 for padding."""
        self._given = attention_mask is not None
        self._mask = None
        if attention_mask is None:
            return
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            raise ValueError(f"attention_mask is {shape}; give the tokenizer's mask of shape (batch, tokens)")
        padding = attention_mask == 0
        if padding.any():
            self._mask = padding

    @property
    def attention_mask(self) -> Tensor | None:
        """1 for tokens, 0 for padding; `None` where no token is known to be padding."""
        return None if self._mask is None else (~self._mask).long()

    def of_tokens(self, positions: Tensor) -> Tensor | None:
        """`[B, L]` bool for tokens at `positions` `[B, L]`, True where they are padding; `None` where none is."""
        if self._mask is None:
            return None
        mask = self._for_batch(positions.shape[0]).to(positions.device)
        known = positions.clamp_max(mask.shape[1] - 1)
        padding = mask.gather(1, known) & (positions < mask.shape[1])
        return padding if padding.any() else None

    def select_rows(self, indices: Tensor, batch: int) -> None:
        """Follow the batch of size `batch` where its rows are reordered, repeated or selected."""
        if self._mask is not None:
            self._mask = self._for_batch(batch)[indices.to(self._mask.device)]

    def warn_if_unknown(self, keys: Tensor) -> None:
        """Say once that a batch of different rows is folded although nobody told which tokens are padding."""
        if self._given or self._warned or keys.shape[0] == 1 or torch.equal(keys[1:], keys[:-1]):
            return
        self._warned = True
        warnings.warn(
            f"A batch of {keys.shape[0]} rows is folded without knowing its padding. If rows are padded, give the "
            "cache the mask: MergingDynamicCache(..., attention_mask=inputs['attention_mask']); if none is, give a "
            "mask of ones to silence this.",
            stacklevel=2,
        )

    def _for_batch(self, batch: int) -> Tensor:
        rows = self._mask.shape[0]
        if batch % rows:
            raise ValueError(
                f"attention_mask has {rows} rows, but the batch has {batch}; give one row per prompt (each is repeated "
                "for beams and return sequences)"
            )
        return self._mask.repeat_interleave(batch // rows, dim=0)
