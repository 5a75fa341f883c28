"""Finds which norm a module computes, by running it."""

from __future__ import annotations

import itertools
from copy import deepcopy

import torch
from torch import Tensor, nn

from ..description import Norm, Source
from .explain import NotKnown, same

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
_USUAL_EPS = (1e-5, 1e-6, 1e-12)
"""Tried for a norm that does not keep it."""


def normalise(x: Tensor, centred: bool, eps: float) -> Tensor:
    """RMS norm, or layer norm if `centred`, of the last axis, without weights."""
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _find(module: nn.Module, width: int) -> tuple[bool, float, float] | None:
    """Returns (centred, eps, offset of the weight) of a norm over `width` numbers, or None if it is another one.

    Its parameters must be random and in memory.
    """
    named = [getattr(module, name) for name in _EPS_NAMES if isinstance(getattr(module, name, None), float)]
    own = dict(module.named_parameters())
    weight = own.get("weight", torch.ones(width)).double()
    bias = own.get("bias", torch.zeros(width)).double()
    # Small numbers, so that eps shows.
    x = 0.01 * torch.randn(2, *weight.shape, dtype=torch.float64) + 0.003
    with torch.no_grad():
        found = module(x.to(own["weight"].dtype if "weight" in own else x.dtype)).double()
    for centred, offset, eps in itertools.product((False, True), (0.0, 1.0), named or _USUAL_EPS):
        if same(normalise(x, centred, eps) * (weight + offset) + bias, found):
            return centred, eps, offset
    return None


def _rounds(module: nn.Module, width: int, centred: bool, eps: float, offset: float) -> bool:
    """Whether a norm in bf16 rounds the normalised numbers before it weighs them."""
    low = deepcopy(module).to(torch.bfloat16)
    own = dict(low.named_parameters())
    weight = own.get("weight", torch.ones(width)).float() + offset
    bias = own.get("bias", torch.zeros(width)).float()
    x = torch.randn(64, *weight.shape).bfloat16()
    with torch.no_grad():
        found = low(x)
    plain = normalise(x.float(), centred, eps)
    once = (plain * weight + bias).bfloat16()
    twice = (plain.bfloat16().float() * weight + bias).bfloat16()
    return int((found == twice).sum()) > int((found == once).sum())


def read_norm(name: str, module: nn.Module, source: Source, width: int) -> Norm:
    """Describes a norm over blocks of `width` columns. Raises NotKnown if it is no known one."""
    found = _find(module, width)
    if found is None:
        raise NotKnown(f"{name or 'the final norm'} ({type(module).__name__}) is no known norm")
    centred, eps, offset = found
    own = dict(module.named_parameters())
    prefix = f"{name}." if name else ""
    weight = f"{prefix}weight" if "weight" in own else None
    bias = f"{prefix}bias" if "bias" in own else None
    rounds = _rounds(module, width, centred, eps, offset)
    return Norm(name, source, width, centred, eps, weight, offset, bias, rounds)
