"""Training batches for the demo model: whole documents packed into rows, with loss only on the model's own text."""

from __future__ import annotations

import random

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .chat import ASSISTANT, BOS, IGNORED, PAD, SPECIAL_TOKENS, SYSTEM, USER, document

_SHORTEST = 8  # Tokens. Very few documents are shorter.


class Batches:
    """An endless stream of (ids, targets), both [B, T] int64, from a seed. Each document is newly drawn."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._waiting: list[list[int]] = []

    def _documents(self, amount: int) -> list[list[int]]:
        texts = [document(self._rng) for _ in range(amount)]
        return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _row(self, length: int) -> list[int]:
        """Makes one row: the oldest document (cut if too long), then documents that fit after it, then padding."""
        if len(self._waiting) < 512:
            self._waiting += self._documents(2048)
        row = self._waiting.pop(0)[:length]
        index = 0
        while index < len(self._waiting) and len(row) + _SHORTEST <= length:
            if len(row) + len(self._waiting[index]) <= length:
                row += self._waiting.pop(index)
            else:
                index += 1
        return row + [PAD] * (length - len(row))

    def next(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Returns `rows` rows of `length` tokens, and the targets, with -100 for positions without a loss."""
        packed = np.array([self._row(length + 1) for _ in range(rows)], dtype=np.int64)
        ids, following = packed[:, :-1], packed[:, 1:]
        position = np.arange(length)
        last_special = np.maximum.accumulate(np.where(ids < len(SPECIAL_TOKENS), position, 0), axis=1)
        speaker = np.take_along_axis(ids, last_special, axis=1)
        plain = (speaker == BOS) & (following != SYSTEM) & (following != USER)
        spoken = (speaker == ASSISTANT) | plain
        targets = np.where(spoken & (following != PAD), following, IGNORED)
        return torch.from_numpy(ids.copy()), torch.from_numpy(targets)
