"""Reads the parameters of a model, and packs matrices for the kernels. Only this rank's part of each is read.

Linears over the same input become one. Gate and up become another one, in alternating blocks of 16 rows, so that one
kernel has both and can multiply them. Their last blocks are filled with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kv.memory import Scratch
from ..model.checkpoint import Checkpoint
from ..model.cut import WHOLE, Cut, Range
from ..model.dummy import dummy_tensor
from ..model.parts.model import ModelDescription
from . import ops

BLOCK = 16
"""Number of rows of gate, and then of up, in the linear that has both."""
_READ_BYTES = 4 << 20
"""Bytes that are read before they are packed. They fit in a cache."""


@dataclass(frozen=True)
class Matrix:
    """Rows of a weight in the order in which they are wanted, and a part of their columns."""

    shape: tuple[int, int]
    fill: Callable[[Tensor, int], None]
    """Reads rows, from a given one on, into a tensor [m, k]."""


class Parameters:
    """The parameters of a model by their names in transformers, from a checkpoint or made up."""

    def __init__(
        self,
        description: ModelDescription,
        checkpoint: Checkpoint | None,
        dtype: torch.dtype,
        seed: int,
        on_bytes: Callable[[int], None],
    ) -> None:
        """`seed`: of what is made up if there is no checkpoint. `on_bytes` gets the bytes that were read."""
        self._description, self._checkpoint, self._dtype, self._seed = description, checkpoint, dtype, seed
        self._on_bytes = on_bytes
        self._rows, self._half = Scratch(), Scratch()
        self._last = "", torch.empty(0)
        self._shapes = {
            f"{description.layers}.{index}.{name}": shape
            for index, kind in enumerate(description.parts.kinds)
            for name, shape in description.shapes[kind].items()
        }
        parts = description.parts
        self._shapes |= dict.fromkeys((description.embedding, self.head), (parts.vocab, parts.hidden))
        self._shapes |= dict.fromkeys(self.norm, (parts.hidden,))
        if parts.head_bias:
            self._shapes[f"{description.head}.bias"] = (parts.vocab,)
        self._names = set(checkpoint.names) if checkpoint is not None else set[str]()

    @property
    def head(self) -> str:
        """The parameter that is the head's weight."""
        return f"{self._description.head}.weight"

    @property
    def norm(self) -> list[str]:
        """The parameters of the final norm."""
        part = self._description.parts.final_norm
        return [f"{self._description.norm}.{name}" for name in (part.weight, part.bias) if name is not None]

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one tensor: both are used if both are stored, as in transformers."""
        both = (self.head, self._description.embedding)
        return self._description.tied and not all(self._is_stored(name) for name in both)

    def bytes_of(self, parameters: Iterable[str]) -> int:
        """Returns the bytes of these whole parameters in memory."""
        return sum(math.prod(self._shapes[name]) for name in parameters) * self._dtype.itemsize

    def check(self, parameters: Iterable[str], layers: Collection[int]) -> None:
        """Checks the tensors of these parameters before they are read.

        Raises:
            CheckpointError: one is missing, has the wrong shape, or another of these layers would not be used.
            UnsupportedModel: one is quantized.
        """
        checkpoint = self._checkpoint
        if checkpoint is None:
            return
        used: list[str] = []
        for parameter in parameters:
            stored = self._description.tensors_of(self._resolved(parameter))
            names = [name for expert in stored.tensors for name in expert]
            if missing := [name for name in names if name not in self._names]:
                raise checkpoint.lacking(missing)
            used += names
            shape = self._shapes[parameter]
            if not stored.stacked:
                checkpoint.check_shape(names[0], shape)
                continue
            checkpoint.check_shape(names[0], shape, (len(stored.tensors), *shape[1:]))
            for expert in stored.tensors:
                rows = sum(checkpoint.info(name).shape[0] for name in expert)
                checkpoint.check_shape(expert[0], shape[1:], (rows, *checkpoint.info(expert[0]).shape[1:]))
        known = {
            name
            for parameter in self._shapes
            for expert in self._description.tensors_of(self._resolved(parameter)).tensors
            for name in expert
        }
        checkpoint.check_use(used, known, layers, self._description.ignored)

    def vector(self, parameter: str) -> Tensor:
        """Reads a whole parameter as fp32. Raises CheckpointError."""
        parameter = self._resolved(parameter)
        shape = self._shapes[parameter]
        self._on_bytes(math.prod(shape) * self._dtype.itemsize)
        if self._checkpoint is None:
            return self._made_up(parameter, shape)
        (name,) = self._description.tensors_of(parameter).tensors[0]
        return self._checkpoint.read(name).float()

    def matrix(self, parameter: str, rows: Sequence[int] | None = None, columns: Range | None = None) -> Matrix:
        """Returns rows and columns of a parameter [n, k]; None for all."""
        return self._matrix(self._resolved(parameter), None, rows, columns)

    def expert(
        self, parameter: str, index: int, rows: Sequence[int], columns: Range | None, transposed: bool
    ) -> Matrix:
        """Returns rows and columns of one expert's matrix. `transposed`: it is stored as [k, n]."""
        if not transposed:
            return self._matrix(parameter, index, rows, columns)
        inside = range(*columns) if columns is not None else range(self._shapes[parameter][1])
        return turned(self._matrix(parameter, index, inside, None), self._dtype, rows)

    def pack(self, parts: Sequence[Matrix], out: Tensor, *, gated: bool = False) -> int:
        """Packs matrices as one linear into `out`. They are read some rows at a time. Returns its number of outputs."""
        k = parts[0].shape[1]
        n = outputs(parts, gated)
        step = max(1, _READ_BYTES // (k * self._dtype.itemsize * ops.PANEL)) * ops.PANEL
        for start in range(0, n, step):
            rows = self._rows.tensor((min(step, n - start), k), self._dtype)
            if gated:
                self._alternate(parts, rows, start // 2)
            else:
                _concatenate(parts, rows, start)
            ops.pack(rows, out[start:])
        return n

    def _alternate(self, parts: Sequence[Matrix], rows: Tensor, start: int) -> None:
        """Fills `rows` with blocks of each part in turn, from row `start` of each on. Pads their ends with zeros."""
        for i, part in enumerate(parts):
            own = self._half.tensor((len(rows) // 2, rows.shape[1]), self._dtype)
            known = max(0, part.shape[0] - start)
            part.fill(own[:known], start)
            own[known:] = 0
            rows.view(-1, 2, BLOCK, rows.shape[1])[:, i] = own.view(-1, BLOCK, rows.shape[1])

    def _matrix(self, parameter: str, expert: int | None, rows: Sequence[int] | None, columns: Range | None) -> Matrix:
        *outer, n, k = self._shapes[parameter]
        rows = range(n) if rows is None else rows
        checkpoint, made_up = self._checkpoint, torch.empty(0)
        pieces: list[_Piece] = []
        if checkpoint is None:
            made_up = self._made_up(parameter, (*outer, n, k))
            made_up = made_up if expert is None else made_up[expert]
        else:
            pieces = self._pieces(checkpoint, parameter, expert, n)
        cut = WHOLE if columns is None else Cut(1, (columns,))

        def fill(out: Tensor, start: int) -> None:
            wanted = rows[start : start + len(out)]
            if checkpoint is None:
                out.copy_(cut.apply(made_up[list(wanted)]))
            else:
                at = 0
                for name, first, count in _reads(pieces, wanted):
                    checkpoint.read_rows(out[at : at + count], name, first, cut)
                    at += count
            self._on_bytes(out.nbytes)

        return Matrix((len(rows), k if columns is None else columns[1] - columns[0]), fill)

    def _pieces(self, checkpoint: Checkpoint, parameter: str, expert: int | None, n: int) -> list[_Piece]:
        stored = self._description.tensors_of(parameter)
        if not stored.stacked:
            return [_Piece(stored.tensors[0][0], n * (expert or 0), n)]
        return [_Piece(name, 0, checkpoint.info(name).shape[0]) for name in stored.tensors[expert or 0]]

    def _made_up(self, parameter: str, shape: tuple[int, ...]) -> Tensor:
        if self._last[0] != parameter:
            self._last = parameter, dummy_tensor(parameter, torch.Size(shape), self._seed).to(self._dtype).float()
        return self._last[1]

    def _is_stored(self, parameter: str) -> bool:
        return self._description.tensors_of(parameter).tensors[0][0] in self._names

    def _resolved(self, parameter: str) -> str:
        """Returns the parameter that is stored for embedding and head, if they are tied."""
        ends = (self._description.embedding, self.head)
        if parameter not in ends or not self.tied:
            return parameter
        return self.head if self._is_stored(self.head) else self._description.embedding


@dataclass(frozen=True)
class _Piece:
    """Rows [first, first + count) of a tensor, seen as a matrix."""

    tensor: str
    first: int
    count: int


def _reads(pieces: Sequence[_Piece], rows: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """Yields (tensor, first row, count) for these rows of pieces one below the other."""
    at = 0
    while at < len(rows):
        row = rows[at]
        for piece in pieces:
            if row < piece.count:
                break
            row -= piece.count
        count = 1
        limit = min(len(rows) - at, piece.count - row)
        while count < limit and rows[at + count] == rows[at] + count:
            count = limit if isinstance(rows, range) and rows.step == 1 else count + 1
        yield piece.tensor, piece.first + row, count
        at += count


def turned(matrix: Matrix, dtype: torch.dtype, rows: Sequence[int] | None = None) -> Matrix:
    """Returns these columns of a small matrix as rows; None for all. It is read at once."""
    whole = torch.empty(matrix.shape, dtype=dtype)
    matrix.fill(whole, 0)
    columns = whole.T if rows is None else whole.T[list(rows)]

    def fill(out: Tensor, start: int) -> None:
        out.copy_(columns[start : start + len(out)])

    return Matrix((len(columns), len(whole)), fill)


def outputs(parts: Sequence[Matrix], gated: bool) -> int:
    """Returns the number of outputs of a linear that is made of these matrices."""
    if not gated:
        return sum(part.shape[0] for part in parts)
    return 2 * math.ceil(parts[0].shape[0] / BLOCK) * BLOCK


def _concatenate(parts: Sequence[Matrix], rows: Tensor, start: int) -> None:
    """Fills `rows` from row `start` on of the parts one below the other."""
    for part in parts:
        first, last = max(0, start), min(part.shape[0], start + len(rows))
        if first < last:
            part.fill(rows[first - start : last - start], first)
        start -= part.shape[0]
