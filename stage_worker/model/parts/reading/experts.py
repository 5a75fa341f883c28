"""Finds what one expert of a mixture computes, by running the module with tiny weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..description import Experts, Router, Source
from .explain import ACTIVATIONS, same

_SIZE, _WIDTH = 6, 4


def swiglu_oss(gate: Tensor, up: Tensor) -> Tensor:
    """The gate of GPT-OSS: limited, and with one added to `up`."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def find_experts(name: str, module: nn.Module, source: Source, router: Router) -> Experts | None:
    """Describes the experts of a module, or returns None if they compute nothing known."""
    own = dict(module.named_parameters(recurse=False))
    if set(own) - {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"} or "gate_up_proj" not in own:
        return None
    count, rows, columns = own["down_proj"].shape
    for transposed in (False, True):
        found = _try(module, count, transposed)
        if found is not None:
            activation, interleaved = found
            width, bias = rows if transposed else columns, "down_proj_bias" in own
            return Experts(name, source, router, count, width, activation, transposed, interleaved, bias)
    return None


def _try(module: nn.Module, count: int, transposed: bool) -> tuple[str, bool] | None:
    kept = dict(module._parameters)
    tiny = {"gate_up_proj": (count, 2 * _WIDTH, _SIZE), "down_proj": (count, _SIZE, _WIDTH)}
    x = 3 * torch.randn(3, _SIZE, dtype=torch.float64)
    chosen = torch.tensor([[0, count - 1]] * len(x))
    weights = torch.rand(len(x), 2, dtype=torch.float64)
    attributes = {"hidden_size": _SIZE, "hidden_dim": _SIZE, "expert_dim": _WIDTH, "intermediate_dim": _WIDTH}
    old = {name: getattr(module, name) for name in attributes if hasattr(module, name)}
    new: dict[str, Tensor] = {}
    try:
        for name, parameter in kept.items():
            if parameter is None:
                continue
            shape: tuple[int, ...] = tiny.get(name, (count, tiny[name.removesuffix("_bias")][1]))
            if name in tiny and transposed:
                shape = shape[0], shape[2], shape[1]
            new[name] = torch.randn(shape, dtype=torch.float64)
            setattr(module, name, nn.Parameter(new[name], requires_grad=False))
        for name in old:
            setattr(module, name, attributes[name])
        out = module(x, chosen, weights)
    except (RuntimeError, IndexError):
        return None
    finally:
        for name, parameter in kept.items():
            module._parameters[name] = parameter
        for name, value in old.items():
            setattr(module, name, value)
    out = out.reshape(x.shape)
    for activation, interleaved, made in _ways(new, x, chosen, weights, transposed):
        if same(made, out):
            return activation, interleaved
    return None


def _ways(
    own: dict[str, Tensor], x: Tensor, chosen: Tensor, weights: Tensor, transposed: bool
) -> Iterator[tuple[str, bool, Tensor]]:
    def product(x: Tensor, name: str, expert: int) -> Tensor:
        weight = own[name][expert]
        out = x @ (weight if transposed else weight.T)
        return out + own[f"{name}_bias"][expert] if f"{name}_bias" in own else out

    gates = {name: (lambda gate, up, f=function: f(gate) * up) for name, function in ACTIVATIONS.items()}
    for interleaved in (False, True):
        for activation, function in (*gates.items(), ("swiglu_oss", swiglu_oss)):
            total = torch.zeros_like(x)
            for at in range(chosen.shape[1]):
                expert = int(chosen[0, at])
                both = product(x, "gate_up_proj", expert)
                gate, up = (both[:, ::2], both[:, 1::2]) if interleaved else both.chunk(2, dim=1)
                total += weights[:, at : at + 1] * product(function(gate, up), "down_proj", expert)
            yield activation, interleaved, total
