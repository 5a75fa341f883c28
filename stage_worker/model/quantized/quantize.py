"""Quantizes the weights of a checkpoint while it loads (`--quantization`).

int8 and fp8 have a scale for each row. int4 has groups of a row, each with a scale and the code of zero, chosen among a
few ranges by the least squared error. Embeddings, the head, norms and routers stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stagemesh.errors import UnsupportedModel

from .packed import Packed, pack

Method = Literal["int8", "fp8", "int4"]
GROUPS = (128, 64, 32, 16)
"""Sizes of groups of int4, the first one that divides the inputs is used."""
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Parts of a group's range that are tried. A smaller one rounds most weights less, and clips the largest."""
_BLOCK_ELEMENTS = 1 << 18
_NOT_QUANTIZED = re.compile(r"norm|\.gate\.|router|shared_expert_gate|bias$|sinks$")


def is_quantizable(parameter: str, shape: Sequence[int]) -> bool:
    """Whether a parameter of transformers' model is the weight of a linear in a layer, or of a stack of experts."""
    return len(shape) > 1 and bool(re.search(r"\.layers\.\d+\.", parameter)) and not _NOT_QUANTIZED.search(parameter)


def quantize(weight: Tensor, method: Method) -> Packed:
    """Quantizes a weight [n, k] of any float type, on a CPU. A row's result does not depend on other rows.

    Raises:
        UnsupportedModel: int4 cannot hold an odd number of inputs.
    """
    make = {"int8": _int8, "fp8": _fp8, "int4": _int4}[method]
    parts = [make(rows.float()) for rows in _few_rows(weight)]
    first = parts[0]
    if len(parts) == 1:
        return first
    zeros = [part.zeros for part in parts if isinstance(part.zeros, Tensor)]
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return Packed(first.kind, codes, scales, first.group, torch.cat(zeros) if zeros else None)


def round_trip(weight: Tensor, method: Method) -> None:
    """Replaces a weight [n, k] by its values after quantization, in place."""
    for rows in _few_rows(weight):
        rows.copy_(quantize(rows.cpu(), method).dequantize(weight.dtype))


def _few_rows(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, _BLOCK_ELEMENTS // weight.shape[1]))


def _int8(rows: Tensor) -> Packed:
    scales = _above_zero(rows.abs().amax(1, keepdim=True) / 127)
    codes = (rows / scales).round_().clamp_(-127, 127).to(torch.int8)
    return Packed("int8", codes.view(torch.uint8), scales, rows.shape[1])


def _fp8(rows: Tensor) -> Packed:
    scales = _above_zero(rows.abs().amax(1, keepdim=True) / 448)
    codes = (rows / scales).clamp_(-448, 448).to(torch.float8_e4m3fn)
    return Packed("fp8", codes.view(torch.uint8), scales, rows.shape[1])


def _int4(rows: Tensor) -> Packed:
    n, k = rows.shape
    group = next((size for size in GROUPS if k % size == 0), k)
    if k % 2:
        raise UnsupportedModel(f"a weight of {k} inputs cannot be quantized to int4: an even number is needed")
    values = rows.view(n, -1, group)
    low, high = values.amin(2).clamp_(max=0), values.amax(2).clamp_(min=0)
    least = torch.full_like(low, float("inf"))
    best = torch.zeros_like(values), torch.zeros_like(low), torch.zeros_like(low)
    for part in _SHRINK:
        scales = _above_zero((high - low) * (part / 15)).bfloat16().float()
        zeros = (-low * part / scales).round_().clamp_(0, 15)
        codes = (values / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, 15)
        error = ((codes - zeros[..., None]) * scales[..., None] - values).square_().sum(2)
        better, least = error < least, torch.minimum(error, least)
        for old, new, where in zip(best, (codes, scales, zeros), (better[..., None], better, better), strict=True):
            old.copy_(torch.where(where, new, old))
    codes, scales, zeros = best
    whole = pack(codes.view(n, k).to(torch.uint8), "int4")
    return Packed("int4", whole, scales.bfloat16(), group, zeros.bfloat16())


def _above_zero(scales: Tensor) -> Tensor:
    """Returns scales that can be divided by. Those of zeros only do not matter."""
    return scales.clamp(min=1e-30)
