"""A question with its answer, and the rule that keeps a fixed share of questions out of the training."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its only right answer. `key` names the case. `plain` is the same as plain text, if any."""

    question: str
    answer: str
    key: str = ""
    plain: str = ""

    @property
    def held_out(self) -> bool:
        """Whether this case belongs to the share that is never trained on."""
        return bool(self.key) and zlib.crc32(self.key.encode()) % 1000 < HELD_OUT_SHARE * 1000


Task = Callable[[random.Random], Example]
