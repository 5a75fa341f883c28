"""Weights of 8 bits, one a byte, with scales beside them: FP8 and int8 of most methods.

Scales are for the whole tensor, for rows, for groups of columns, or for blocks of rows and columns (DeepSeek-V3,
https://arxiv.org/abs/2412.19437, section 3.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cut import Range
from .packed import Kind, Packed, finest, of_columns
from .stored import Share, Stored, as_scales, span

_KINDS: dict[str, Kind] = {"F8_E4M3": "fp8", "I8": "int8"}


def read(stored: Stored, share: Share) -> Packed:
    """Reads a weight with `weight_scale` or `weight_scale_inv`. Both are factors of the stored numbers."""
    scale = next((part for part in ("weight_scale_inv", "scale_inv") if part in stored.parts), "weight_scale")
    return from_parts(stored, share, "weight", scale, "weight_zero_point")


def read_bitsandbytes(stored: Stored, share: Share) -> Packed:
    """Reads bitsandbytes' INT8. Its scale of a row is the row's largest value."""
    packed = from_parts(stored, share, "weight", "SCB", "")
    return Packed(packed.kind, packed.codes, packed.scales.float() / 127, packed.group)


def from_parts(stored: Stored, share: Share, codes: str, scale: str, zero_point: str) -> Packed:
    """Reads a weight from the parts of these names. Raises CheckpointError if they do not fit together."""
    dtype, offset = stored.info(codes).dtype, share.expert * stored.n
    if dtype not in _KINDS:
        raise stored.wrong(f"is stored as {dtype}, and {' or '.join(_KINDS)} can be read")
    experts = stored.shape[0] if len(stored.shape) == 3 else 1
    rows = offset + share.rows[0], offset + share.rows[1]
    first, last = share.columns
    block, shape = _blocks(stored, scale, experts)
    scales = as_scales(_of_rows(stored, scale, share, block, shape), stored.info(scale).dtype)
    zeros = None
    if zero_point in stored.parts:
        zeros = _of_rows(stored, zero_point, share, block, shape).view(torch.int8).to(scales.dtype)
    start = first // block[1] * block[1]
    return Packed(
        _KINDS[dtype],
        stored.block(codes, (experts * stored.n, stored.k), rows, share.columns),
        of_columns(scales, block[1], first - start, last - start),
        finest(block[1], first - start, last - start),
        of_columns(zeros, block[1], first - start, last - start) if zeros is not None and zeros.any() else None,
    )


def _blocks(stored: Stored, scale: str, experts: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the rows and columns that share a scale, and the shape [block rows, block columns] of one expert."""
    found = stored.info(scale).shape
    n, k, count = stored.n, stored.k, stored.info(scale).parameters // experts
    if count == 1:
        return (n, k), (1, 1)
    block = stored.quantization.block
    if block is not None and found[-2:] != (n, 1):
        shape = -(-n // block[0]), -(-k // block[1])
        if count == shape[0] * shape[1]:
            return block, shape
    if count == n:
        return (1, k), (n, 1)
    groups = found[-1]
    if count == n * groups and k % groups == 0:
        return (1, k // groups), (n, groups)
    raise stored.wrong(f"of {[n, k]} has scales of {list(found)}, which are not for its rows, groups or blocks")


def _of_rows(stored: Stored, part: str, share: Share, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Reads the scales of the share's rows, a row of scales for each, and of the blocks with its columns."""
    at: Range = span(block[0], share.rows)
    offset = share.expert * shape[0]
    experts = stored.shape[0] if len(stored.shape) == 3 else 1
    whole = experts * shape[0], shape[1]
    found = stored.block(part, whole, (offset + at[0], offset + at[1]), span(block[1], share.columns))
    rows = torch.arange(*share.rows) // block[0] - at[0]
    return found[rows]
