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

PANEL = 32
"""Number of outputs that are packed together."""

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int32


class Shape(ctypes.Structure):
    """The common properties of all layers of a stage. Head counts and widths are this rank's."""

    _fields_ = (
        ("is_bf16", _Int),
        ("hidden", _Int),
        ("heads", _Int),
        ("kv_heads", _Int),
        ("head_dim", _Int),
        ("intermediate", _Int),
        ("page_size", _Int),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("inverse_frequencies", _Pointer),
        ("threads", _Int),
        ("tp_rank", _Int),
        ("tp_size", _Int),
        ("idle_cores", _Pointer),
        ("idle_count", _Int),
    )


class Linear(ctypes.Structure):
    """A packed linear."""

    _fields_ = (("weights", _Pointer), ("bias", _Pointer), ("n", _Int), ("k", _Int))


class Layer(ctypes.Structure):
    """One decoder layer."""

    _fields_ = (
        ("norm1", _Pointer),
        ("norm2", _Pointer),
        ("q_norm", _Pointer),
        ("k_norm", _Pointer),
        ("qkv", Linear),
        ("o", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("k_pages", _Pointer),
        ("v_pages", _Pointer),
        ("window", _Int),
    )


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
    for call in (lib.stagemesh_begin, lib.stagemesh_layer, lib.stagemesh_head):
        call.errcheck = _check  # type: ignore[assignment]
    lib.stagemesh_pack.restype = None
    lib.stagemesh_pack.argtypes = [ctypes.c_int, pointer, ctypes.c_int, ctypes.c_int, pointer]
    lib.stagemesh_open.restype, lib.stagemesh_open.argtypes = pointer, [ctypes.POINTER(Shape), pointer]
    lib.stagemesh_close.restype, lib.stagemesh_close.argtypes = None, [pointer]
    lib.stagemesh_exchange_open.restype = pointer
    lib.stagemesh_exchange_open.argtypes = [pointer, ctypes.c_int, ctypes.c_int, size, ctypes.c_double]
    lib.stagemesh_begin.argtypes = [pointer, ctypes.POINTER(Step)]
    lib.stagemesh_layer.argtypes = [pointer, ctypes.POINTER(Layer), pointer]
    lib.stagemesh_head.argtypes = [
        *(pointer, pointer, ctypes.POINTER(Linear), pointer, pointer, ctypes.c_int, pointer, ctypes.c_int)
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
    loaded().stagemesh_pack(rows.dtype == torch.bfloat16, rows.data_ptr(), n, k, out.data_ptr())


class StageEngine:
    """Workspaces and threads of one stage."""

    def __init__(self, shape: Shape, exchange: int | None = None) -> None:
        """`exchange`: handle of an `Exchange`, needed for several ranks."""
        self._lib = loaded()
        self._engine = self._lib.stagemesh_open(ctypes.byref(shape), exchange)
        self._closer = weakref.finalize(self, self._lib.stagemesh_close, self._engine)

    def begin(self, step: Step) -> None:
        """Sets the rows for the next calls of `layer`. `step` and its arrays must live until after these calls."""
        self._lib.stagemesh_begin(self._engine, ctypes.byref(step))

    def layer(self, layer: Layer, hidden: int) -> None:
        """Runs one layer over hidden states [T, H] at this address, in place. Writes keys and values to their pages.

        Raises:
            TransportError: another rank is lost or late.
        """
        self._lib.stagemesh_layer(self._engine, ctypes.byref(layer), hidden)

    def head(self, norm: int, weight: Linear, hidden: int, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """Computes logits [R, V] fp32 for `rows` [R] int32 of the hidden states. Only rank 0 gets whole logits.

        Raises:
            TransportError: another rank is lost or late.
        """
        count, vocab = logits.shape
        self._lib.stagemesh_head(
            *(self._engine, norm, ctypes.byref(weight), hidden, rows.data_ptr(), count, logits.data_ptr(), vocab)
        )
