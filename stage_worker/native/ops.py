"""The Python interface of the compiled kernels (stage.cpp): structures, memory, and a class for a stage's engine.

The kernels exist if the extension was built at install and this processor has AVX512-BF16. Otherwise the plain shard
serves. Pointers are passed as integers. The code that fills a structure must keep the memory behind its pointers alive.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from array import array
from pathlib import Path

import torch

from stagemesh.errors import InternalError, TransportError

from ..kv.memory import zeros
from .structures import DTYPES, CodeRows, Linear, Operation, Shape

PANEL = 32
"""Number of outputs that are packed together."""

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int32


class Step(ctypes.Structure):
    """Rows of one step: starts, counts, and where each row's pages begin in `tables` (all int32)."""

    _fields_ = (
        ("rows", _Int),
        ("tokens", _Int),
        ("starts", _Pointer),
        ("counts", _Pointer),
        ("offsets", _Pointer),
        ("tables", _Pointer),
        ("alone", _Int),
    )
    arrays: tuple[array[int], ...] = ()
    """The memory behind the pointers."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns the kernels, or None if they were not built or this processor cannot run them."""
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not found:
        return None
    lib = ctypes.CDLL(str(found[0]))
    if not lib.stagemesh_supported():
        return None
    size, pointer = ctypes.c_size_t, _Pointer
    for call in (lib.stagemesh_begin, lib.stagemesh_run, lib.stagemesh_head):
        call.errcheck = _check  # type: ignore[assignment]
    lib.stagemesh_pack.restype = None
    lib.stagemesh_pack.argtypes = [ctypes.c_int, pointer, ctypes.c_int, ctypes.c_int, pointer]
    lib.stagemesh_codes_bytes.restype, lib.stagemesh_codes_bytes.argtypes = size, [ctypes.POINTER(Linear)]
    lib.stagemesh_pack_codes.argtypes = [
        *(ctypes.POINTER(Linear), ctypes.c_int, ctypes.c_int, ctypes.POINTER(CodeRows), pointer)
    ]
    lib.stagemesh_open.restype, lib.stagemesh_open.argtypes = pointer, [ctypes.POINTER(Shape), pointer]
    lib.stagemesh_close.restype, lib.stagemesh_close.argtypes = None, [pointer]
    lib.stagemesh_exchange_open.restype = pointer
    lib.stagemesh_exchange_open.argtypes = [pointer, ctypes.c_int, ctypes.c_int, size, ctypes.c_double]
    lib.stagemesh_begin.argtypes = [pointer, ctypes.POINTER(Step)]
    lib.stagemesh_run.argtypes = [pointer, ctypes.POINTER(Operation), ctypes.c_int, pointer]
    lib.stagemesh_head.argtypes = [
        *(
            pointer,
            ctypes.POINTER(Operation),
            ctypes.POINTER(Linear),
            pointer,
            pointer,
            ctypes.c_int,
            pointer,
            ctypes.c_int,
        )
    ]
    return lib


def _check(code: int, *_call: object) -> None:
    if code == 2:
        raise TransportError("a rank of this tensor-parallel group is lost or late")
    if code:
        raise InternalError("no memory for the step's workspace")


def has_tiles() -> bool:
    """Whether bf16 linears use AMX tiles on this processor."""
    return bool(loaded().stagemesh_has_tiles())


def loaded() -> ctypes.CDLL:
    """Returns the kernels. Raises InternalError if there are none."""
    lib = library()
    if lib is None:
        raise InternalError("the compiled kernels are not available here")
    return lib


def panels(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Makes the memory for the packed weight of a linear: [n rounded up to whole panels, k]."""
    return zeros((-(-n // PANEL) * PANEL, k), dtype)


def pack(rows: torch.Tensor, out: torch.Tensor) -> None:
    """Packs contiguous rows [n, k] of a weight into the first panels of `out`. The last one is filled with zeros."""
    n, k = rows.shape
    loaded().stagemesh_pack(DTYPES[rows.dtype], rows.data_ptr(), n, k, out.data_ptr())


class StageEngine:
    """Workspaces and threads of one stage."""

    def __init__(self, shape: Shape, exchange: int | None = None) -> None:
        """`exchange`: handle of an `Exchange`, needed for several ranks."""
        self._lib = loaded()
        self._engine = self._lib.stagemesh_open(ctypes.byref(shape), exchange)
        self._closer = weakref.finalize(self, self._lib.stagemesh_close, self._engine)

    def begin(self, step: Step) -> None:
        """Sets the rows for the next calls of `run`. `step` and its arrays must live until after these calls."""
        self._lib.stagemesh_begin(self._engine, ctypes.byref(step))

    def run(self, operations: ctypes.Array[Operation], hidden: int) -> None:
        """Runs one layer over hidden states [T, H] at this address, in place. Writes keys and values to their pages.

        Raises:
            TransportError: another rank is lost or late.
        """
        self._lib.stagemesh_run(self._engine, operations, len(operations), hidden)

    def head(self, norm: Operation, weight: Linear, hidden: int, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Computes logits [R, V] fp32 for `rows` [R] int32 of the hidden states. Only rank 0 gets whole logits.

        Raises:
            TransportError: another rank is lost or late.
        """
        count, vocab = logits.shape
        self._lib.stagemesh_head(
            *(self._engine, ctypes.byref(norm), ctypes.byref(weight), hidden, rows.data_ptr(), count),
            *(logits.data_ptr(), vocab),
        )
