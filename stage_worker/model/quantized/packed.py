"""The one form of a quantized weight in memory, whatever format it was stored in, and its values.

A format's reader makes it without loss. The compiled kernels multiply by it. `dequantize` is the reference of both.

Shapes: n outputs, k inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int8", "fp8", "int4", "fp4", "nf4"]
"""int8 is signed, fp8 is e4m3fn, int4 is 0 to 15, fp4 is e2m1, nf4 is the table of QLoRA (Dettmers et al., 2023)."""
BITS: dict[Kind, int] = {"int8": 8, "fp8": 8, "int4": 4, "fp4": 4, "nf4": 4}
FP4 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4 = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)  # fmt: skip
_BLOCK_ELEMENTS = 1 << 18
"""Number of weights that are dequantized at a time. Their fp32 values fit in a cache."""


@dataclass(frozen=True)
class Packed:
    """A linear's weight [n, k]: value = scale * (code - zero) * row_scale."""

    kind: Kind
    codes: Tensor
    """uint8 [n, k] for 8 bits, or [n, k / 2] for 4 bits with the even column in the low half."""
    scales: Tensor
    """[n, k / group] in fp32, fp16 or bf16, whichever holds the checkpoint's scales exactly."""
    group: int
    """Number of columns that share a scale. It divides k."""
    zeros: Tensor | float | None = None
    """The code of the value 0, of the shape and dtype of `scales`, or one number for all, or None if it is 0."""
    row_scale: Tensor | None = None
    """fp32 [n]: one more factor of each row."""
    order: Tensor | None = None
    """int32 [k]: column i belongs to input order[i]. None if it is i."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of outputs n and of inputs k."""
        return len(self.codes), self.codes.shape[1] * 8 // BITS[self.kind]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        parts = (self.codes, self.scales, self.zeros, self.row_scale, self.order)
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))

    def rows(self, first: int, last: int) -> Packed:
        """Returns rows [first, last). They share the memory."""
        return replace(
            self,
            codes=self.codes[first:last],
            scales=self.scales[first:last],
            zeros=self.zeros[first:last] if isinstance(self.zeros, Tensor) else self.zeros,
            row_scale=None if self.row_scale is None else self.row_scale[first:last],
        )

    def take(self, rows: Tensor) -> Packed:
        """Returns rows [m] in any order, in new memory."""
        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[rows],
            zeros=self.zeros[rows] if isinstance(self.zeros, Tensor) else self.zeros,
            row_scale=None if self.row_scale is None else self.row_scale[rows],
        )

    def columns(self, first: int, last: int) -> Packed:
        """Returns the weights of inputs [first, last). Groups that they do not fill become smaller ones."""
        k = self.shape[1]
        if (first, last) == (0, k):
            return self
        if self.order is not None:
            kept = ((self.order >= first) & (self.order < last)).nonzero()[:, 0]
            codes = unpack(self.codes, self.kind)[:, kept]
            part = grouped(self.kind, codes, self.scales, kept // self.group, self.zeros)
            return replace(part, row_scale=self.row_scale, order=self.order[kept] - first)
        group = finest(self.group, first, last)
        at = slice(first * BITS[self.kind] // 8, last * BITS[self.kind] // 8)
        return replace(
            self,
            codes=self.codes[:, at],
            scales=of_columns(self.scales, self.group, first, last),
            zeros=of_columns(self.zeros, self.group, first, last) if isinstance(self.zeros, Tensor) else self.zeros,
            group=group,
        )

    def contiguous(self) -> Packed:
        """Returns the same with each tensor in one piece of memory, row by row."""
        return replace(
            self,
            codes=self.codes.contiguous(),
            scales=self.scales.contiguous(),
            zeros=self.zeros.contiguous() if isinstance(self.zeros, Tensor) else self.zeros,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the values [n, k]."""
        out = torch.empty(self.shape, dtype=dtype)
        self.dequantize_into(out)
        return out

    def dequantize_into(self, out: Tensor) -> None:
        """Fills `out` [n, k] with the values, some rows at a time. They are computed in fp32, then rounded once."""
        n, k = self.shape
        step = max(1, _BLOCK_ELEMENTS // max(1, k))
        for first in range(0, n, step):
            part = self.rows(first, min(n, first + step))
            values = decode(unpack(part.codes, self.kind), self.kind).view(len(part.codes), -1, self.group)
            if isinstance(part.zeros, Tensor):
                values -= part.zeros.float()[..., None]
            elif part.zeros is not None:
                values -= part.zeros
            values *= part.scales.float()[..., None]
            values = values.view(-1, k)
            if part.row_scale is not None:
                values *= part.row_scale[:, None]
            if self.order is not None:
                values = torch.empty_like(values).index_copy_(1, self.order.long(), values)
            out[first : first + len(values)] = values


def join(parts: Sequence[Packed]) -> Packed | None:
    """Returns the rows of all parts one below the other, or None if they do not have the same form."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({_form(part) for part in parts}) > 1:
        return None
    if any(not _same(part.order, first.order) for part in parts):
        return None

    def joined(tensors: Sequence[Tensor | float | None]) -> Tensor | float | None:
        given = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        return torch.cat(given) if given else tensors[0]

    row_scale = joined([part.row_scale for part in parts])
    assert row_scale is None or isinstance(row_scale, Tensor)
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=joined([part.zeros for part in parts]),
        row_scale=row_scale,
    )


def _form(part: Packed) -> object:
    zeros = "each" if isinstance(part.zeros, Tensor) else part.zeros
    return part.kind, part.shape[1], part.group, part.scales.dtype, zeros, part.row_scale is None


def _same(some: Tensor | None, other: Tensor | None) -> bool:
    return some is other or (some is not None and other is not None and torch.equal(some, other))


def unpack(codes: Tensor, kind: Kind) -> Tensor:
    """Returns codes [n, k], one a byte."""
    if BITS[kind] == 8:
        return codes
    return torch.stack([codes & 15, codes >> 4], -1).view(len(codes), -1)


def pack(codes: Tensor, kind: Kind) -> Tensor:
    """Reverses `unpack`."""
    if BITS[kind] == 8:
        return codes.contiguous()
    return codes[:, ::2] | codes[:, 1::2] << 4


def decode(codes: Tensor, kind: Kind) -> Tensor:
    """Returns the fp32 values of codes [n, k], without their scales, in new memory."""
    if kind == "int8":
        return codes.view(torch.int8).float()
    if kind == "fp8":
        return codes.view(torch.float8_e4m3fn).float()
    if kind == "int4":
        return codes.float()
    return (FP4 if kind == "fp4" else NF4)[codes.int()]


def finest(group: int, first: int, last: int) -> int:
    """Returns the number of columns that share a scale within columns [first, last), where groups start at 0."""
    if first // group == (last - 1) // group:
        return last - first
    return math.gcd(group, first, last)


def of_columns(scales: Tensor, group: int, first: int, last: int) -> Tensor:
    """Returns the scales of columns [first, last), in groups of `finest`."""
    if first // group == (last - 1) // group:
        return scales[:, first // group, None]
    own = finest(group, first, last)
    starts = torch.arange(first, last, own)
    return scales if own == group and len(starts) == scales.shape[1] else scales[:, starts // group]


def grouped(kind: Kind, codes: Tensor, scales: Tensor, group_of: Tensor, zeros: Tensor | float | None = None) -> Packed:
    """Sorts columns by their groups, so that those of one group lie together.

    Args:
        kind: what codes mean.
        codes: uint8 [n, k], one a byte.
        scales: [n, groups].
        group_of: [k], the group of each column.
        zeros: as `scales`, or one number.

    If groups have different numbers of columns, they are divided into smaller ones of one size.
    """
    order = torch.argsort(group_of, stable=True)
    sizes = torch.unique_consecutive(group_of[order], return_counts=True)[1]
    group = math.gcd(*sizes.tolist())
    groups = group_of[order][::group]
    return Packed(
        kind,
        pack(codes[:, order], kind),
        scales[:, groups],
        group,
        zeros[:, groups] if isinstance(zeros, Tensor) else zeros,
        order=None if torch.equal(order, torch.arange(len(order))) else order.int(),
    )
