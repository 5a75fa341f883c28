"""AWQ (Lin et al., 2024) as AutoAWQ's `gemm` version stores it: integers of 4 bits in words along the outputs.

`qweight` [k, n / 8] and `qzeros` [groups, n / 8] are int32, `scales` are [groups, n]. Eight outputs of a word lie in
the order 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kv.memory import zeros as new_zeros
from .packed import Packed, finest, of_columns, pack
from .stored import Share, Stored, span, unpacked_words

_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Place within its word of each output."""
_BLOCK_WORDS = 1 << 18


def read(stored: Stored, share: Share) -> Packed:
    """Reads a weight. Raises CheckpointError if its tensors do not fit together."""
    n, k = stored.shape
    groups, width = stored.info("scales").shape[0], n // 8
    if n % 8 or k % groups:
        raise stored.wrong(f"of {[n, k]} has {groups} groups in words of 8 outputs, which do not divide it")
    group, of_words = k // groups, span(8, share.rows)
    at = span(group, share.columns)
    words = stored.block("qweight", (k, width), share.columns, of_words)
    skipped, count = share.rows[0] - 8 * of_words[0], share.rows[1] - share.rows[0]
    codes = new_zeros((8 * words.shape[1], len(words) // 2), torch.uint8, huge_pages=False)
    step = max(1, _BLOCK_WORDS // len(words))
    for first in range(0, words.shape[1], step):
        part = _outputs(words[:, first : first + step])
        codes[8 * first : 8 * first + part.shape[1]] = pack(part.t(), "int4")
    zeros = _outputs(stored.block("qzeros", (groups, width), at, of_words))[:, skipped : skipped + count].t()
    scales = stored.block("scales", (groups, n), at, share.rows).t()
    begin, end = (column - at[0] * group for column in share.columns)
    return Packed(
        "int4",
        codes[skipped : skipped + count],
        of_columns(scales, group, begin, end),
        finest(group, begin, end),
        of_columns(zeros, group, begin, end).to(scales.dtype),
    )


def _outputs(words: Tensor) -> Tensor:
    """Returns the numbers [rows, outputs] in int32 words [rows, outputs / 8], one a byte."""
    found = unpacked_words(words, 4)
    return found.view(len(found), -1, 8)[:, :, _PLACES].reshape(len(found), -1)
