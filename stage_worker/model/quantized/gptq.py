"""GPTQ (Frantar et al., 2023) as AutoGPTQ and GPTQModel store it: integers of 4 or 8 bits in words along the inputs.

`qweight` [k / 8, n] and `qzeros` [groups, n / 8] are int32 (for 4 bits), `scales` are [groups, n]. `g_idx` [k] gives
the group of each input. In version 1 the stored zero point is one too small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packed import Kind, Packed, finest, grouped, of_columns, unpack
from .stored import Share, Stored, codes_of_words, midpoint, span, unpacked_words


def read(stored: Stored, share: Share) -> Packed:
    """Reads a weight. Raises CheckpointError if its tensors do not fit together."""
    n, k = stored.shape
    words_down = stored.info("qweight").shape[0]
    bits = 32 * words_down // k
    if bits not in (4, 8):
        raise stored.wrong(f"of {[n, k]} has {bits} bits, and 4 or 8 can be read")
    kind: Kind = "int4" if bits == 4 else "int8"
    words = stored.block("qweight", (words_down, n), span(32 // bits, share.columns), share.rows)
    codes = codes_of_words(words.t(), bits, share.columns)
    groups = stored.info("scales").shape[0]
    group = -(-k // groups)
    even = torch.arange(*share.columns) // group
    group_of = stored.whole("g_idx")[slice(*share.columns)].long() if "g_idx" in stored.parts else even
    ordered = k % groups != 0 or not torch.equal(group_of, even)
    at = (0, groups) if ordered else span(group, share.columns)
    scales = stored.block("scales", (groups, n), at, share.rows).t()
    zeros = _zeros(stored, share, bits, at, scales)
    if ordered:
        return grouped(kind, unpack(codes, kind), scales, group_of, zeros)
    first, last = (column - at[0] * group for column in share.columns)
    return Packed(
        kind,
        codes,
        of_columns(scales, group, first, last),
        finest(group, first, last),
        of_columns(zeros, group, first, last) if isinstance(zeros, Tensor) else zeros,
    )


def _zeros(stored: Stored, share: Share, bits: int, groups: tuple[int, int], scales: Tensor) -> Tensor | float | None:
    """Returns the zero points [n, groups], or one number if the configuration says that they are symmetric."""
    rows, width = stored.info("qzeros").shape
    words = stored.block("qzeros", (rows, width), groups, span(32 // bits, share.rows))
    first = share.rows[0] % (32 // bits)
    found = unpacked_words(words, bits)[:, first : first + len(scales)].t().short() + stored.quantization.zero_offset
    if not stored.quantization.symmetric:
        return (found - (0 if bits == 4 else 128)).to(scales.dtype)
    if not (found == 1 << bits - 1).all():
        raise stored.wrong("has zero points, though config.json says that it is symmetric (sym)")
    return midpoint(bits)
