"""The structures of the compiled kernels (stage.cpp), field by field."""

from __future__ import annotations

import ctypes

import torch

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int32
_Float = ctypes.c_float

KINDS = {"Normalise": 0, "Multiply": 1, "Gather": 2, "Combine": 3, "Gate": 4, "Attend": 5, "Mix": 6, "MultiplyHeads": 7}
"""Kind of an operation -> its number."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODES = {"int8": 1, "fp8": 2, "int4": 3, "fp4": 4, "nf4": 5}
"""Kind of a quantized weight -> its number. Plain weights have 0."""
SCORES = ("softmax", "sigmoid", "none")
ACTIVATIONS = (*("none", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "softplus"),)
"""In the order of their numbers."""


class Rotary(ctypes.Structure):
    """One rotary embedding."""

    _fields_ = (("frequencies", _Pointer), ("half", _Int), ("scale", _Float))


class Shape(ctypes.Structure):
    """The common properties of all layers of a stage. Widths are this rank's."""

    _fields_ = (
        ("dtype", _Int),
        ("hidden", _Int),
        ("page_size", _Int),
        ("widths", _Pointer),
        ("buffers", _Int),
        ("rotaries", _Pointer),
        ("rotary_count", _Int),
        ("threads", _Int),
        ("tp_rank", _Int),
        ("tp_size", _Int),
        ("idle_cores", _Pointer),
        ("idle_count", _Int),
    )


class Linear(ctypes.Structure):
    """A packed linear. The fields behind `k` are those of a quantized weight (linear.h)."""

    _fields_ = (
        ("weights", _Pointer),
        ("bias", _Pointer),
        ("n", _Int),
        ("k", _Int),
        ("codes", _Int),
        ("group", _Int),
        ("scale_type", _Int),
        ("zeros", _Int),
        ("zero", _Int),
        ("row_scales", _Int),
        ("ordered", _Int),
    )


class CodeRows(ctypes.Structure):
    """Rows of a quantized weight that are to be packed."""

    _fields_ = (("codes", _Pointer), ("scales", _Pointer), ("zeros", _Pointer), ("row_scales", _Pointer))


class Place(ctypes.Structure):
    """Columns of a buffer."""

    _fields_ = (("buffer", _Int), ("first", _Int), ("width", _Int))


class Term(ctypes.Structure):
    """A place with its factor in a sum, or with its first column in a copy."""

    _fields_ = (("place", Place), ("factor", _Float), ("first", _Int))


class Attention(ctypes.Structure):
    """What an operation of attention needs."""

    _fields_ = (
        ("query", Place),
        ("key", Place),
        ("value", Place),
        ("heads", _Int),
        ("kv_heads", _Int),
        ("dim", _Int),
        ("value_dim", _Int),
        ("window", _Int),
        ("rotary", _Int),
        ("value_in_key", _Int),
        ("scale", _Float),
        ("softcap", _Float),
        ("sinks", _Pointer),
        ("k_pages", _Pointer),
        ("v_pages", _Pointer),
    )


class Router(ctypes.Structure):
    """How experts are chosen and weighed."""

    _fields_ = (
        ("logits", Linear),
        ("experts", _Int),
        ("used", _Int),
        ("scores", _Int),
        ("groups", _Int),
        ("groups_used", _Int),
        ("group_top", _Int),
        ("chosen_by_logits", _Int),
        ("softmax_of_chosen", _Int),
        ("normalise", _Int),
        ("factor", _Float),
        ("bias", _Pointer),
        ("choice_bias", _Pointer),
    )


class Mixture(ctypes.Structure):
    """A mixture of experts."""

    _fields_ = (
        ("router", Router),
        ("gate_up", Linear),
        ("down", Linear),
        ("width", _Int),
        ("limited", _Int),
        ("gate_up_bytes", ctypes.c_size_t),
        ("down_bytes", ctypes.c_size_t),
    )


class Operation(ctypes.Structure):
    """One operation. `assemble.py` says which kind uses which fields."""

    _fields_ = (
        ("kind", _Int),
        ("activation", _Int),
        ("centred", _Int),
        ("rounds", _Int),
        ("gated", _Int),
        ("adds", _Int),
        ("sums", _Int),
        ("source", Place),
        ("other", Place),
        ("to", Place),
        ("width", _Int),
        ("blocks", _Int),
        ("eps", _Float),
        ("factor", _Float),
        ("clip", _Float),
        ("weight", _Pointer),
        ("bias", _Pointer),
        ("linear", Linear),
        ("terms", _Pointer),
        ("term_count", _Int),
        ("attention", Attention),
        ("mixture", Mixture),
        ("heads", _Int),
        ("source_step", _Int),
        ("to_step", _Int),
        ("head_bytes", ctypes.c_size_t),
    )
