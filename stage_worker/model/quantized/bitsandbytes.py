"""NF4 (Dettmers et al., 2023) as bitsandbytes stores it: codes of the flattened weight, and a scale for each block.

The even element is in the high half of a byte. Scales may be quantized themselves (nested), in blocks of 256.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..cut import Range
from .packed import NF4, Packed, finest, of_columns
from .stored import Share, Stored, span


def shape(checkpoint: Checkpoint, state: str) -> tuple[int, int]:
    """Returns the shape [n, k] that the tensor `state` describes. Raises CheckpointError."""
    n, k = _state(checkpoint, state)["shape"]
    return int(n), int(k)


def _state(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(checkpoint.read(name).tolist()))
    return state


def read(stored: Stored, share: Share) -> Packed:
    """Reads a weight. Raises CheckpointError if its tensors do not fit together."""
    n, k = stored.shape
    state = _state(stored.checkpoint, stored.tensor("quant_state"))
    block, (first, last) = int(state["blocksize"]), share.columns
    if not torch.allclose(stored.whole("quant_map").float(), NF4, atol=1e-6):
        raise stored.wrong("has a table of values (quant_map) that is not NF4's")
    if k % block:
        raise stored.wrong(f"of {[n, k]} has blocks of {block}, which do not divide its rows")
    codes = stored.block("weight", (n, k // 2), share.rows, (first // 2, last // 2))
    at = span(block, share.columns)
    scales = _scales(stored, state, (n, k // block), share.rows, at)
    begin, end = first - at[0] * block, last - at[0] * block
    group = finest(block, begin, end)
    return Packed("nf4", codes << 4 | codes >> 4, of_columns(scales, block, begin, end), group)


def _scales(stored: Stored, state: dict[str, Any], whole: tuple[int, int], rows: Range, columns: Range) -> Tensor:
    found = stored.block("absmax", whole, rows, columns)
    if "nested_absmax" not in stored.parts:
        return found
    place = torch.arange(*rows)[:, None] * whole[1] + torch.arange(*columns)
    scale = stored.whole("nested_absmax").float()[place // int(state["nested_blocksize"])]
    values = stored.whole("nested_quant_map").float()[found.int()] * scale
    return values + float(state["nested_offset"])
