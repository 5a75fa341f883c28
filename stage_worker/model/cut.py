"""The part of a tensor that a tensor-parallel rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Range = tuple[int, int]
"""A half-open range."""


def even_range(size: int, parts: int, index: int) -> Range:
    """Returns the `index`-th of `parts` consecutive ranges of `size`. Their lengths differ by at most one."""
    return size * index // parts, size * (index + 1) // parts


@dataclass(frozen=True)
class Cut:
    """The concatenation of `ranges` along `dim`, in ascending order. `dim` None is the whole tensor."""

    dim: int | None = None
    ranges: tuple[Range, ...] = ()

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the rank's part of the whole tensor. A true part is a copy."""
        if self.dim is None:
            return tensor
        return torch.cat([tensor.narrow(self.dim, start, stop - start) for start, stop in self.ranges], self.dim)

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the rank's part."""
        shape = list(whole)
        if self.dim is not None:
            shape[self.dim] = sum(stop - start for start, stop in self.ranges)
        return tuple(shape)


WHOLE = Cut()
