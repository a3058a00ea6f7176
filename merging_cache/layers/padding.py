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
        self._told = False  # by the user
        self._known = False  # or by the attention of a linked model
        self._warned = False
        self.set(attention_mask)

    def set(self, attention_mask: Tensor | None) -> None:
        """Take a mask `[rows, columns]` as tokenizers give it: 1 for tokens, 0 for padding."""
        self._told = self._known = attention_mask is not None
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
    def is_there(self) -> bool:
        """Whether any token may be padding."""
        return self._mask is not None

    @property
    def attention_mask(self) -> Tensor | None:
        """1 for tokens, 0 for padding; `None` where no token is known to be padding."""
        return None if self._mask is None else (~self._mask).long()

    def of_tokens(self, positions: Tensor) -> Tensor | None:
        """`[B, L]` bool for tokens at `positions` `[B, L]`, True where they are padding; `None` where none is."""
        if self._mask is None:
            return None
        mask = self._for_batch(positions.shape[0]).to(positions.device)
        padding = mask.gather(1, positions.clamp(0, mask.shape[1] - 1)) & (positions < mask.shape[1])
        return padding if padding.any() else None

    def observe(self, padding: Tensor | None, first: int, batch: int) -> None:
        """Learn from an attention mask which tokens of a pass are padding, unless the user has told.

        Args:
            padding: `[B, q]` bool for the tokens at positions `first` to `first + q - 1`; `None` where none is.
            first: the position of the first of them.
            batch: B.
        """
        if self._told:
            if first or padding is None or self._mask is None or self._mask.shape[1] >= padding.shape[1]:
                return
            self._mask, self._told = None, False  # something came before what it is of: the attention knows better
        self._known = True
        padding = None if padding is None else padding.expand(batch, -1)
        if padding is None or not padding.any():
            if self._mask is not None:
                self._mask = self._mask[:, :first]
            return
        before = torch.zeros((batch, first), dtype=torch.bool, device=padding.device)
        if self._mask is not None:
            mask = self._for_batch(batch).to(padding.device)[:, :first]
            before[:, : mask.shape[1]] = mask
        self._mask = torch.cat([before, padding], dim=1)

    def check_width(self, new: int) -> None:
        """Refuse a mask that is narrower than the first pass, of `new` tokens, where no attention knows better."""
        if self._mask is not None and self._mask.shape[1] < new:
            raise ValueError(
                f"attention_mask is of {self._mask.shape[1]} tokens, but the first pass has {new}, so it is not known "
                "which of them are padding (soft prompts come before the tokens, say). Give a mask that is as wide as "
                "the pass, or the cache the model: model=model"
            )

    def row_positions(self, positions: Tensor) -> Tensor:
        """Positions `[B, ..., L]` in the padded sequence to positions in the row alone; padding gets negative ones."""
        if self._mask is None or self._mask.shape[1] == 0:
            return positions
        mask = self._for_batch(positions.shape[0]).to(positions.device)
        flat = positions.flatten(1)
        index = flat.clamp(0, mask.shape[1] - 1)
        alone = flat - mask.cumsum(dim=1).gather(1, index)
        padding = mask.gather(1, index) & (flat < mask.shape[1])
        return torch.where(padding | (flat < 0), -1 - flat, alone).view_as(positions)

    def sequence_positions(self, positions: Tensor) -> Tensor:
        """The inverse of `row_positions`."""
        if self._mask is None or self._mask.shape[1] == 0:
            return positions
        mask = self._for_batch(positions.shape[0]).to(positions.device)
        real = mask.to(torch.uint8).sort(dim=1, stable=True).indices  # positions of real tokens first
        num_real = (~mask).sum(dim=1, keepdim=True)
        flat = positions.flatten(1)
        known = real.gather(1, flat.clamp(0, mask.shape[1] - 1))
        later = flat + (mask.shape[1] - num_real)
        sequence = torch.where(flat < num_real, known, later)
        return torch.where(flat < 0, -1 - flat, sequence).view_as(positions)

    def select_rows(self, indices: Tensor, batch: int) -> None:
        """Follow the batch of size `batch` where its rows are reordered, repeated or selected."""
        if self._mask is not None:
            self._mask = self._for_batch(batch)[indices.to(self._mask.device)]

    def warn_if_unknown(self, keys: Tensor) -> None:
        """Say once that a batch of different rows is folded although nobody told which tokens are padding."""
        if self._known or self._warned or keys.shape[0] == 1 or torch.equal(keys[1:], keys[:-1]):
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
