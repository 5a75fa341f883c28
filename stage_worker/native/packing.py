"""Packs matrices as the weight of one linear. It is read and packed some rows at a time.

Linears over the same input become one. Gate and up become another one, in alternating blocks of 16 rows, so that one
kernel has both and can multiply them. Their last blocks are filled with zeros. A quantized weight stays in few bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..kv.memory import Scratch
from ..model.quantized.packed import Packed, join
from . import ops
from .program.operations import NoKernel
from .quantized import pack_quantized, quantized_linear, quantized_panels
from .structures import Linear
from .weights import Matrix

BLOCK = 16
"""Number of rows of gate, and then of up, in the linear that has both."""
_READ_BYTES = 4 << 20
"""Bytes that are read before they are packed. They fit in a cache."""
_QUANTIZED_ROWS = 32 * ops.PANEL
"""Number of quantized rows that are packed at a time."""


class Packing:
    """The rows of one linear, from matrices one below the other, or in turn."""

    def __init__(self, parts: Sequence[Matrix], dtype: torch.dtype, *, gated: bool = False) -> None:
        """`gated`: the matrices are gate and up. `dtype`: of a weight that is not quantized.

        Raises:
            NoKernel: the kernels do not have this weight.
        """
        self._parts, self._dtype, self._gated = parts, dtype, gated
        self._packed = [part.packed for part in parts if part.packed is not None] if alike(parts) else []
        n, k = outputs(parts, gated), parts[0].shape[1]
        if self._packed:
            self.linear = quantized_linear(self._few_bits(0, 1), n)
        elif k % 2 and dtype != torch.float32:
            raise NoKernel(f"a linear over {k} columns, which is odd")
        else:
            self.linear = Linear(n=n, k=k)
        """The linear, without memory and bias."""

    def memory(self) -> Tensor:
        """Makes the memory for the weight, uint8."""
        if self._packed:
            return quantized_panels(self.linear)
        return ops.panels(self.linear.n, self.linear.k, self._dtype).flatten().view(torch.uint8)

    def write(self, out: Tensor, scratch: tuple[Scratch, Scratch]) -> None:
        """Packs the weight into its memory. `scratch`: memory for the rows that are read at a time.

        Raises:
            CheckpointError: it cannot be read.
        """
        n, k = self.linear.n, self.linear.k
        if self._packed:
            for start in range(0, n, _QUANTIZED_ROWS):
                pack_quantized(self.linear, self._few_bits(start, min(n, start + _QUANTIZED_ROWS)), start, out)
            return
        panels = out.view(self._dtype).view(-1, k)
        step = max(1, _READ_BYTES // (k * self._dtype.itemsize * ops.PANEL)) * ops.PANEL
        for start in range(0, n, step):
            rows = scratch[0].tensor((min(step, n - start), k), self._dtype)
            if self._gated:
                self._alternate(rows, start // 2, scratch[1])
            else:
                _concatenate(self._parts, rows, start)
            ops.pack(rows, panels[start:])

    def _few_bits(self, first: int, last: int) -> Packed:
        """Returns rows [first, last) of the linear in few bits."""
        if not self._gated:
            pieces = []
            for part in self._packed:
                n = part.shape[0]
                if first < n and last > 0:
                    pieces.append(part.rows(max(0, first), min(n, last)))
                first, last = first - n, last - n
            return _join(pieces)
        half = slice(first // 2, -(-last // 2))
        gate, up = (part.rows(half.start, min(half.stop, part.shape[0])) for part in self._packed)
        return _join([gate, up, _zeros(gate)]).take(_alternated(gate.shape[0])[: last - first])

    def _alternate(self, rows: Tensor, start: int, scratch: Scratch) -> None:
        """Fills `rows` with blocks of each part in turn, from row `start` of each on. Pads their ends with zeros."""
        for i, part in enumerate(self._parts):
            own = scratch.tensor((len(rows) // 2, rows.shape[1]), self._dtype)
            known = max(0, min(len(own), part.shape[0] - start))
            part.fill(own[:known], start)
            own[known:] = 0
            rows.view(-1, 2, BLOCK, rows.shape[1])[:, i] = own.view(-1, BLOCK, rows.shape[1])


def outputs(parts: Sequence[Matrix], gated: bool) -> int:
    """Returns the number of outputs of a linear that is made of these matrices."""
    if not gated:
        return sum(part.shape[0] for part in parts)
    return 2 * math.ceil(parts[0].shape[0] / BLOCK) * BLOCK


def alike(parts: Sequence[Matrix]) -> bool:
    """Whether one linear can hold these matrices as they are: all plain, or all quantized in the same form."""
    packed = [part.packed for part in parts if part.packed is not None]
    return not packed or (len(packed) == len(parts) and join([part.rows(0, 1) for part in packed]) is not None)


def _join(parts: Sequence[Packed]) -> Packed:
    joined = join(parts)
    assert joined is not None  # The parts are alike.
    return joined


def _zeros(like: Packed) -> Packed:
    """Returns a row of zeros."""
    row = like.rows(0, 1)
    zeros = torch.zeros_like(row.zeros) if isinstance(row.zeros, Tensor) else row.zeros
    return replace(row, codes=torch.zeros_like(row.codes), scales=torch.zeros_like(row.scales), zeros=zeros)


def _alternated(count: int) -> Tensor:
    """Returns the order in which `count` rows of gate, as many of up, and a row of zeros after them are packed."""
    padding = torch.full((-count % BLOCK,), 2 * count)
    blocks = [torch.cat([rows, padding]).view(-1, BLOCK) for rows in torch.arange(2 * count).view(2, count)]
    return torch.stack(blocks, 1).flatten()


def _concatenate(parts: Sequence[Matrix], rows: Tensor, start: int) -> None:
    """Fills `rows` from row `start` on of the parts one below the other."""
    for part in parts:
        first, last = max(0, start), min(part.shape[0], start + len(rows))
        if first < last:
            part.fill(rows[first - start : last - start], first)
        start -= part.shape[0]
