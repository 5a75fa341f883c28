"""Reads the parameters of a model. Only this rank's part of each is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..kv.memory import Scratch
from ..model.cut import WHOLE, Cut, Range
from ..model.dummy import dummy_tensor
from ..model.parts.model import ModelDescription
from ..model.quantized.packed import Packed, join
from ..model.quantized.quantize import is_quantizable, quantize
from ..model.quantized.weights import Weights


@dataclass(frozen=True)
class Matrix:
    """Rows of a weight in the order in which they are wanted, and a part of their columns."""

    shape: tuple[int, int]
    fill: Callable[[Tensor, int], None]
    """Reads rows, from a given one on, into a tensor [m, k]."""
    packed: Packed | None = None
    """The same in few bits, if it is quantized."""


class Parameters:
    """The parameters of a model by their names in transformers, from a checkpoint or made up."""

    def __init__(
        self,
        description: ModelDescription,
        weights: Weights | None,
        dtype: torch.dtype,
        seed: int,
        quantization: Literal["", "int8", "fp8", "int4"],
        on_bytes: Callable[[int], None],
    ) -> None:
        """
        Args:
            description: says which tensors a parameter is made of.
            weights: the checkpoint, or None to make weights up.
            dtype: of what is not quantized.
            seed: of what is made up.
            quantization: how linears and experts are quantized that are not yet.
            on_bytes: gets the bytes that were read.
        """
        self._description, self._weights, self._dtype, self._seed = description, weights, dtype, seed
        self._on_bytes, self._quantization = on_bytes, quantization
        self.scratch = Scratch(), Scratch()
        """Memory for what is read at a time."""
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
        self._names = set(weights.names) if weights is not None else set[str]()

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

    def is_quantized(self, parameter: str) -> bool:
        """Whether a parameter is stored quantized."""
        if self._weights is None:
            return False
        name = self._description.tensors_of(self._resolved(parameter)).tensors[0][0]
        return self._weights.quantized.is_quantized(name)

    def bytes_of(self, parameters: Iterable[str]) -> int:
        """Returns the bytes of these whole parameters in memory."""
        return sum(math.prod(self._shapes[name]) for name in parameters) * self._dtype.itemsize

    def check(self, parameters: Iterable[str], layers: Collection[int]) -> None:
        """Checks the tensors of these parameters before they are read.

        Raises:
            CheckpointError: one is missing, has the wrong shape, or another of these layers would not be used.
            UnsupportedModel: one is quantized.
        """
        weights = self._weights
        if weights is None:
            return
        used: list[str] = []
        for parameter in parameters:
            stored = self._description.tensors_of(self._resolved(parameter))
            names = [name for expert in stored.tensors for name in expert]
            if missing := [name for name in names if name not in self._names]:
                raise weights.checkpoint.lacking(missing)
            used += names
            shape = self._shapes[parameter]
            if not stored.stacked:
                weights.check_shape(names[0], shape)
                continue
            weights.check_shape(names[0], shape, (len(stored.tensors), *shape[1:]))
            for expert in stored.tensors:
                rows = sum(weights.shape(name)[0] for name in expert)
                weights.check_shape(expert[0], shape[1:], (rows, *weights.shape(expert[0])[1:]))
        known = {
            name
            for parameter in self._shapes
            for expert in self._description.tensors_of(self._resolved(parameter)).tensors
            for name in expert
        }
        weights.check_use(used, known, layers, self._description.ignored)

    def vector(self, parameter: str) -> Tensor:
        """Reads a whole parameter as fp32. Raises CheckpointError."""
        parameter = self._resolved(parameter)
        shape = self._shapes[parameter]
        self._on_bytes(math.prod(shape) * self._dtype.itemsize)
        if self._weights is None:
            return self._made_up(parameter, shape)
        (name,) = self._description.tensors_of(parameter).tensors[0]
        return self._weights.read(name, self._dtype).float()

    def matrix(self, parameter: str, rows: Sequence[int] | None = None, columns: Range | None = None) -> Matrix:
        """Returns rows and columns of a parameter [n, k]; None for all."""
        parameter = self._resolved(parameter)
        return self._in_few_bits(parameter, self._matrix(parameter, None, rows, columns))

    def expert(
        self, parameter: str, index: int, rows: Sequence[int], columns: Range | None, transposed: bool
    ) -> Matrix:
        """Returns rows and columns of one expert's matrix. `transposed`: it is stored as [k, n]."""
        if not transposed or self._is_stored_transposed(parameter):
            return self._in_few_bits(parameter, self._matrix(parameter, index, rows, columns))
        inside = range(*columns) if columns is not None else range(self._shapes[parameter][1])
        matrix = turned(self._matrix(parameter, index, inside, None), self._dtype, rows)
        return self._in_few_bits(parameter, matrix)

    def _matrix(self, parameter: str, expert: int | None, rows: Sequence[int] | None, columns: Range | None) -> Matrix:
        *outer, n, k = self._shapes[parameter]
        if self._is_stored_transposed(parameter):
            n, k = k, n
        rows = range(n) if rows is None else rows
        shape = len(rows), k if columns is None else columns[1] - columns[0]
        cut = WHOLE if columns is None else Cut(1, (columns,))
        weights = self._weights
        if weights is None:
            made_up = self._made_up(parameter, (*outer, n, k))
            return self._of_values(made_up if expert is None else made_up[expert], rows, cut, shape)
        pieces = self._pieces(weights, parameter, expert, n)
        if any(weights.quantized.is_quantized(piece.tensor) for piece in pieces):
            own = 0 if expert is None or self._description.tensors_of(parameter).stacked else expert
            return self._quantized(weights, pieces, own, rows, columns, shape)
        checkpoint = weights.checkpoint

        def fill(out: Tensor, start: int) -> None:
            at = 0
            for name, first, count in _reads(pieces, rows[start : start + len(out)]):
                checkpoint.read_rows(out[at : at + count], name, first, cut)
                at += count
            self._on_bytes(out.nbytes)

        return Matrix(shape, fill)

    def _in_few_bits(self, parameter: str, matrix: Matrix) -> Matrix:
        """Quantizes a matrix, if the parameter is to be."""
        if not self._quantization or matrix.packed or not is_quantizable(parameter, self._shapes[parameter]):
            return matrix
        values = torch.empty(matrix.shape, dtype=self._dtype)
        matrix.fill(values, 0)
        packed = quantize(values, self._quantization)
        return Matrix(matrix.shape, partial(_dequantize, packed), packed)

    def _of_values(self, values: Tensor, rows: Sequence[int], cut: Cut, shape: tuple[int, int]) -> Matrix:
        def fill(out: Tensor, start: int) -> None:
            out.copy_(cut.apply(values[list(rows[start : start + len(out)])]))
            self._on_bytes(out.nbytes)

        return Matrix(shape, fill)

    def _quantized(
        self,
        weights: Weights,
        pieces: Sequence[_Piece],
        expert: int,
        rows: Sequence[int],
        columns: Range | None,
        shape: tuple[int, int],
    ) -> Matrix:
        """Reads quantized weights, in few bits."""
        parts = [weights.quantized.packed(piece.tensor, None, columns, expert) for piece in pieces]
        self._on_bytes(math.prod(shape) * self._dtype.itemsize)
        wanted = torch.tensor(rows)
        whole = join(parts)
        if whole is not None:
            whole = whole if isinstance(rows, range) and len(rows) == whole.shape[0] else whole.take(wanted)
            return Matrix(shape, partial(_dequantize, whole), whole)
        values = torch.cat([part.dequantize(self._dtype) for part in parts])[wanted]
        return Matrix(shape, partial(_copy, values))

    def _pieces(self, weights: Weights, parameter: str, expert: int | None, n: int) -> list[_Piece]:
        stored = self._description.tensors_of(parameter)
        if not stored.stacked:
            return [_Piece(stored.tensors[0][0], n * (expert or 0), n)]
        return [_Piece(name, 0, weights.shape(name)[0]) for name in stored.tensors[expert or 0]]

    def _made_up(self, parameter: str, shape: tuple[int, ...]) -> Tensor:
        if self._last[0] != parameter:
            self._last = parameter, dummy_tensor(parameter, torch.Size(shape), self._seed).to(self._dtype).float()
        return self._last[1]

    def _is_stored_transposed(self, parameter: str) -> bool:
        """Whether the tensor has the parameter's inputs as columns though the parameter has them as rows."""
        stored = self._description.tensors_of(parameter)
        if self._weights is None or stored.stacked or len(self._shapes[parameter]) < 3:
            return False
        name = stored.tensors[0][0]
        quantized = self._weights.quantized
        return quantized.is_quantized(name) and self._weights.shape(name) != quantized.shape(name)

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
    return Matrix((len(columns), len(whole)), partial(_copy, columns))


def _copy(values: Tensor, out: Tensor, start: int) -> None:
    out.copy_(values[start : start + len(out)])


def _dequantize(packed: Packed, out: Tensor, start: int) -> None:
    packed.rows(start, start + len(out)).dequantize_into(out)
