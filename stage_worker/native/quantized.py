"""Quantized weights for the compiled kernels: their memory, and packing of rows into it.

The codes stay in their bits (codes.h). Rows are packed some at a time, so a load never holds a second copy of a weight.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch
from torch import Tensor

from stagemesh.errors import CheckpointError, InternalError

from ..kv.memory import zeros
from . import ops
from .program.operations import NoKernel
from .structures import CODES, CodeRows, Linear

_SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Rows(Protocol):
    """Rows of a quantized weight: value = scale * (code - zero) * row_scale. A `Packed` is one."""

    @property
    def kind(self) -> str:
        """A key of `CODES`."""

    @property
    def codes(self) -> Tensor:
        """uint8 [n, k] for 8 bits, or [n, k / 2] for 4 bits with the even column in the low half."""

    @property
    def scales(self) -> Tensor:
        """[n, k / group] in fp32, fp16 or bf16."""

    @property
    def group(self) -> int:
        """Number of columns that share a scale."""

    @property
    def zeros(self) -> Tensor | float | None:
        """Of the shape and dtype of `scales`, or one number for all, or None if it is 0."""

    @property
    def row_scale(self) -> Tensor | None:
        """fp32 [n]."""

    @property
    def order(self) -> Tensor | None:
        """int32 [k]: column i belongs to input order[i]."""


def quantized_linear(rows: Rows, n: int) -> Linear:
    """Describes a linear of `n` outputs whose rows are like `rows`. It has no weights and no bias yet.

    Raises:
        NoKernel: the kernels do not have this combination.
    """
    columns = rows.codes.shape[1] * (1 if rows.kind in ("int8", "fp8") else 2)
    if rows.kind not in CODES:
        raise NoKernel(f"quantized weights of kind {rows.kind} have no kernel: one of {', '.join(CODES)}")
    if rows.scales.dtype not in _SCALE_TYPES:
        raise NoKernel(f"scales are {rows.scales.dtype}, the kernels need fp32, fp16 or bf16")
    if rows.group < 1 or columns % rows.group or rows.scales.shape[1] != columns // rows.group:
        raise NoKernel(f"{rows.scales.shape[1]} scales a row for {columns} columns in groups of {rows.group}")
    if rows.zeros is not None and rows.kind not in ("int8", "int4"):
        raise NoKernel(f"quantized weights of kind {rows.kind} cannot have zeros")
    if isinstance(rows.zeros, Tensor) and (rows.zeros.dtype, rows.zeros.shape) != (
        rows.scales.dtype,
        rows.scales.shape,
    ):
        raise NoKernel(f"zeros are {rows.zeros.dtype} {list(rows.zeros.shape)}, not like the scales")
    if rows.row_scale is not None and rows.row_scale.dtype != torch.float32:
        raise NoKernel(f"row scales are {rows.row_scale.dtype}, the kernels need fp32")
    zero = _common_zero(rows)
    return Linear(
        n=n,
        k=columns,
        codes=CODES[rows.kind],
        group=rows.group,
        scale_type=_SCALE_TYPES[rows.scales.dtype],
        zeros=zero is None,
        zero=zero or 0,
        row_scales=rows.row_scale is not None,
        ordered=rows.order is not None,
    )


def quantized_panels(linear: Linear) -> Tensor:
    """Makes the memory for the weight of `linear`, uint8. Those of experts can follow each other in one tensor."""
    return zeros((ops.loaded().stagemesh_codes_bytes(ctypes.byref(linear)),), torch.uint8)


def pack_quantized(linear: Linear, rows: Rows, first: int, out: Tensor) -> None:
    """Packs rows, from row `first` of the weight on, into the memory of the whole weight.

    `first` is a multiple of `ops.PANEL`. The rest of the last panel is filled with zeros.

    Raises:
        CheckpointError: a code of fp8 is NaN.
        InternalError: rows are not as `linear` says.
    """
    own = quantized_linear(rows, linear.n)
    own.weights, own.bias = linear.weights, linear.bias
    if bytes(own) != bytes(linear) or first % ops.PANEL or first + len(rows.codes) > linear.n:
        raise InternalError(f"rows {first} to {first + len(rows.codes)} are not packed as the linear's other rows")
    scales = rows.scales.contiguous()
    offsets = None
    if linear.zeros:
        given = rows.zeros
        assert given is not None
        offsets = given.contiguous() if isinstance(given, Tensor) else torch.full_like(scales, given)
    if rows.order is not None:
        out[: linear.k * 4].view(torch.int32).copy_(rows.order)
    codes, row_scale = rows.codes.contiguous(), None if rows.row_scale is None else rows.row_scale.contiguous()
    source = CodeRows(codes.data_ptr(), scales.data_ptr(), _address(offsets), _address(row_scale))
    packed = ops.loaded().stagemesh_pack_codes(
        ctypes.byref(linear), first, len(codes), ctypes.byref(source), out.data_ptr()
    )
    if not packed:
        raise CheckpointError("an fp8 weight is NaN: the checkpoint is damaged")


def _common_zero(rows: Rows) -> int | None:
    """Returns the zero of all codes, if there is one that needs no arithmetic."""
    given = rows.zeros
    if given is None:
        return 0
    if isinstance(given, Tensor) or not float(given).is_integer() or (rows.kind == "int8" and given):
        return None
    return int(given)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
