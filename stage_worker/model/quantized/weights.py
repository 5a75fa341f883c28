"""A checkpoint as if it were not quantized: each quantized weight is dequantized while it is read.

For shards that compute with plain parameters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from stagemesh.models.quantized_tensors import IGNORED

from ...kv.memory import zeros
from ..checkpoint import Checkpoint
from ..cut import WHOLE, Cut, Range
from .reader import QuantizedReader

_PIECE, _ALIGNED = 1 << 20, 256
"""Number of weights of one matrix that are in memory in few bits at a time, and of rows or columns in a step."""


class Weights:
    """The weights of a checkpoint, by the names that they have without quantization."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises UnsupportedModel if they are quantized in a way that is not known."""
        self.checkpoint = checkpoint
        self.quantized = QuantizedReader(checkpoint)
        ignored = re.compile(IGNORED) if self.quantized.quantization is not None else None
        self.names = [name for name in self.quantized.names if ignored is None or not ignored.search(name)]
        """Names of all weights."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a weight. Raises CheckpointError."""
        if not self.quantized.is_quantized(name):
            return self.checkpoint.info(name).shape
        shape = self.quantized.shape(name)
        return (shape[0], shape[2], shape[1]) if self._is_transposed(name) else shape

    def floats(self) -> torch.dtype | None:
        """Returns the dtype of a tensor that is not quantized, or None if there is none."""
        names = (name for name in self.names if not self.quantized.is_quantized(name))
        return next((self.checkpoint.dtype(name) for name in names), None)

    def check_use(
        self, used: Collection[str], known: Collection[str], layers: Collection[int], ignored: str = ""
    ) -> None:
        """As `Checkpoint.check_use`. All tensors of a used weight count as used."""
        packed = {
            part for name in used if self.quantized.is_quantized(name) for part in self.quantized.tensors_of(name)
        }
        plain = {name for name in used if not self.quantized.is_quantized(name)}
        known = {*known, *self.quantized.zero_biases(used, known)}
        all_known = {part for name in known for part in self.quantized.tensors_of(name)}
        if self.quantized.quantization is not None:
            ignored = f"{IGNORED}|{ignored}" if ignored else IGNORED
        self.checkpoint.check_use(plain | packed, all_known, layers, ignored, packed)

    def check_shape(self, name: str, expected: Sequence[int], found: Sequence[int] | None = None) -> None:
        """As `Checkpoint.check_shape`."""
        found = self.shape(name) if found is None else found
        self.checkpoint.check_shape(self.quantized.tensors_of(name)[0], expected, found)

    def place(self, name: str) -> tuple[str, int]:
        """As `Checkpoint.place`."""
        return self.checkpoint.place(self.quantized.tensors_of(name)[0])

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Reads a whole weight into new memory. One that is not quantized keeps its own dtype."""
        if not self.quantized.is_quantized(name):
            return self.checkpoint.read(name)
        out = zeros(self.shape(name), dtype, huge_pages=False)
        self.read_into(out, name)
        return out

    def read_into(self, out: Tensor, name: str, cut: Cut = WHOLE) -> None:
        """Fills `out` with a weight, or a part of it. Beside `out`, this needs memory for a piece of `_PIECE` weights.

        Raises CheckpointError, and UnsupportedModel if a part begins or ends within a byte.
        """
        if not self.quantized.is_quantized(name):
            self.checkpoint.read_into(out, name, cut)
            return
        if len(self.quantized.shape(name)) == 2:
            self._read(out, name, cut, 0)
            return
        experts = range(self.shape(name)[0])
        if cut.dim == 0:
            experts = [expert for first, last in cut.ranges for expert in range(first, last)]  # type: ignore[assignment]
            cut = WHOLE
        own = Cut(None if cut.dim is None else cut.dim - 1, cut.ranges)
        for into, expert in zip(out, experts, strict=True):
            if not self._is_transposed(name):
                self._read(into, name, own, expert)
            else:
                turned = own if own.dim is None else Cut(1 - own.dim, own.ranges)
                self._read(into.t(), name, turned, expert)

    def _read(self, out: Tensor, name: str, cut: Cut, expert: int) -> None:
        """Fills `out` [n, k] with the cut of one matrix, some rows or columns at a time, as they lie in the file."""
        n, k = self.quantized.shape(name)[-2:]
        at = 0
        for begin, end in cut.ranges or ((0, n),):
            rows, columns = ((0, n), (begin, end)) if cut.dim == 1 else ((begin, end), (0, k))
            into = out.narrow(cut.dim or 0, at, end - begin)
            at += end - begin
            dim = 1 if self.quantized.reads_columns(name) else 0
            for part in _pieces((rows, columns)[dim], (columns, rows)[dim]):
                share = (part, columns) if dim == 0 else (rows, part)
                packed = self.quantized.packed(name, *share, expert)
                packed.dequantize_into(into.narrow(dim, part[0] - (rows, columns)[dim][0], part[1] - part[0]))

    def _is_transposed(self, name: str) -> bool:
        """Whether the model's parameter has inputs as rows. Those of GPT-OSS's experts do."""
        quantization = self.quantized.quantization
        return quantization is not None and "mxfp4" in quantization.formats and len(self.quantized.shape(name)) == 3


def _pieces(along: Range, across: Range) -> Iterator[Range]:
    """Divides a range into pieces of at most `_PIECE` weights, which begin where groups do."""
    step = max(1, _PIECE // (across[1] - across[0]) // _ALIGNED) * _ALIGNED
    for first in range(along[0], along[1], step):
        yield first, min(first + step, along[1])
