"""Which part of a tensor a tensor-parallel rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Range = tuple[int, int]
"""Half-open."""


def even_range(size: int, parts: int, index: int) -> Range:
    """The `index`-th of `parts` consecutive ranges of `size`, equal but for one: how everything is cut over ranks."""
    return size * index // parts, size * (index + 1) // parts


@dataclass(frozen=True)
class Cut:
    """`ranges` along `dim`, one after the other, in ascending order; `dim` None: the whole tensor."""

    dim: int | None = None
    ranges: tuple[Range, ...] = ()

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rank's part of the whole tensor, in memory of its own where it is a part."""
        if self.dim is None:
            return tensor
        return torch.cat([tensor.narrow(self.dim, start, stop - start) for start, stop in self.ranges], self.dim)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of the rank's part."""
        shape = list(whole)
        if self.dim is not None:
            shape[self.dim] = sum(stop - start for start, stop in self.ranges)
        return tuple(shape)


WHOLE = Cut()
