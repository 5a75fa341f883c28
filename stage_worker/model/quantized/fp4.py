"""Weights in FP4 (e2m1) with a scale for each group: MXFP4 and NVFP4.

MXFP4 (OCP Microscaling formats, 2023) has groups of 32 and powers of two as scales. NVFP4 has groups of 16, FP8 scales,
and one more for the tensor.
"""

from __future__ import annotations

import torch

from .packed import Packed, finest, of_columns
from .stored import Share, Stored, as_scales, span


def read(stored: Stored, share: Share) -> Packed:
    """Reads a weight of ModelOpt or compressed-tensors. Raises CheckpointError if its tensors do not fit together."""
    if "weight_scale_2" in stored.parts:
        factor = stored.whole("weight_scale_2").float()
    elif "weight_global_scale" in stored.parts:
        factor = 1 / stored.whole("weight_global_scale").float()
    else:
        return _read(stored, share, "weight_packed", "weight_scale", None)
    if factor.numel() != 1:
        raise stored.wrong(f"has {factor.numel()} scales for the tensor")
    codes = "weight_packed" if "weight_packed" in stored.parts else "weight"
    return _read(stored, share, codes, "weight_scale", factor.reshape(1))


def read_stack(stored: Stored, share: Share) -> Packed:
    """Reads one expert of GPT-OSS's stacks: `blocks` [E, n, k / 32, 16] and `scales` [E, n, k / 32]."""
    return _read(stored, share, "blocks", "scales", None)


def _read(stored: Stored, share: Share, codes: str, scale: str, factor: torch.Tensor | None) -> Packed:
    n, k = stored.n, stored.k
    whole = n * (stored.shape[0] if len(stored.shape) == 3 else 1)
    groups = stored.info(scale).parameters // whole
    if not groups or k % groups:
        raise stored.wrong(f"of {list(stored.shape)} has scales of {list(stored.info(scale).shape)}")
    rows = share.expert * n + share.rows[0], share.expert * n + share.rows[1]
    group, (first, last) = k // groups, share.columns
    at = span(group, share.columns)
    scales = as_scales(stored.block(scale, (whole, groups), rows, at), stored.info(scale).dtype)
    begin, end = first - at[0] * group, last - at[0] * group
    return Packed(
        "fp4",
        stored.block(codes, (whole, k // 2), rows, (first // 2, last // 2)),
        of_columns(scales, group, begin, end),
        finest(group, begin, end),
        row_scale=None if factor is None else factor.expand(rows[1] - rows[0]).clone(),
    )
