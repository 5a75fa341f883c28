"""Weights of torchao, flattened into plain tensors as transformers saves them in safetensors files.

Its Int8Tensor, Float8Tensor and IntxUnpackedToInt8Tensor hold a number a byte; Int4Tensor holds two, signed, the even
one in the low half, with `scale` and `zero_point` [k / group, n], the latter as the value that is added.
"""

from __future__ import annotations

from . import scaled
from .packed import Packed, finest, of_columns
from .stored import Share, Stored, span


def read(stored: Stored, share: Share) -> Packed:
    """Reads a weight. Raises CheckpointError if its tensors are not of one of these classes."""
    for part in ("scale_and_zero", "act_pre_scale", "per_tensor_scale"):
        if part in stored.parts:
            raise stored.wrong(f"has a {part}, which is of a class of torchao's that is not known")
    if stored.info("qdata").dtype != "U8":
        return scaled.from_parts(stored, share, "qdata", "scale", "zero_point")
    n, k = stored.shape
    groups, (first, last) = stored.info("scale").shape[0], share.columns
    if k % groups:
        raise stored.wrong(f"of {[n, k]} has {groups} groups, which do not divide it")
    group = k // groups
    at = span(group, share.columns)
    scales = stored.block("scale", (groups, n), at, share.rows).t().float().clamp(min=1e-12)
    zeros = 8 - stored.block("zero_point", (groups, n), at, share.rows).t().float() / scales
    codes = stored.block("qdata", (n, k // 2), share.rows, (first // 2, last // 2)) ^ 0x88
    begin, end = first - at[0] * group, last - at[0] * group
    scales, zeros = (of_columns(part, group, begin, end) for part in (scales, zeros))
    return Packed("int4", codes, scales, finest(group, begin, end), zeros)
