"""Integers of 4 or 8 bits in words of 32 bits, along the inputs: the `pack-quantized` format of compressed-tensors.

https://github.com/vllm-project/compressed-tensors: a code is the signed number plus half of the range, the first one in
the lowest bits of a word. Zero points are packed along the outputs.
"""

from __future__ import annotations

from torch import Tensor

from .packed import Kind, Packed, finest, grouped, of_columns, unpack
from .stored import Share, Stored, codes_of_words, midpoint, span, unpacked_words


def read(stored: Stored, share: Share) -> Packed:
    """Reads a weight. Raises CheckpointError if its tensors do not fit together."""
    n, k = stored.shape
    width = stored.info("weight_packed").shape[1]
    bits = next((bits for bits in (4, 8) if -(-k * bits // 32) == width), None)
    if bits is None:
        raise stored.wrong(f"of {[n, k]} is packed into {width} words a row, which are neither 4 nor 8 bits a weight")
    kind: Kind = "int4" if bits == 4 else "int8"
    words = stored.block("weight_packed", (n, width), share.rows, span(32 // bits, share.columns))
    codes = codes_of_words(words, bits, share.columns)
    groups = stored.info("weight_scale").parameters // n
    if not groups or k % groups:
        raise stored.wrong(f"of {[n, k]} has scales of {list(stored.info('weight_scale').shape)}")
    group, ordered = k // groups, "weight_g_idx" in stored.parts
    at = (0, groups) if ordered else span(group, share.columns)
    scales = stored.block("weight_scale", (n, groups), share.rows, at)
    zeros: Tensor | float | None = midpoint(bits)
    if "weight_zero_point" in stored.parts:
        packed_rows = stored.info("weight_zero_point").shape[0], groups
        words = stored.block("weight_zero_point", packed_rows, span(32 // bits, share.rows), at)
        first = share.rows[0] % (32 // bits)
        found = unpacked_words(words.t(), bits)[:, first : first + len(codes)].t()
        zeros = (found.short() - (0 if bits == 4 else 128)).to(scales.dtype)
    if ordered:
        group_of = stored.whole("weight_g_idx")[slice(*share.columns)].long()
        return grouped(kind, unpack(codes, kind), scales, group_of, zeros)
    first, last = (column - at[0] * group for column in share.columns)
    return Packed(
        kind,
        codes,
        of_columns(scales, group, first, last),
        finest(group, first, last),
        of_columns(zeros, group, first, last) if isinstance(zeros, Tensor) else zeros,
    )
