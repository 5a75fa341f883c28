"""Runs one decoder layer with random numbers in place of what its modules compute, and records what goes into each.

Linears, norms and experts are not run: each returns random numbers of the right shape. So weights are not needed, and
every value that the layer's own code combines is independent of all others. Attention is recorded in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...plain import hf
from ..description import ATTENDED, Source
from .explain import NotKnown, Values, explain

SEED = 20261130
POSITIONS = torch.tensor([0, 1, 2, 3, 5, 9, 17, 33, 40, 65, 129, 300, 511])
"""Positions of the tokens of a recording, [T]."""
TOKENS = len(POSITIONS)
"""13: no model has as many heads, so a tensor's axis of tokens is known by its size."""


@dataclass
class Given:
    """What the model's own loop hands to a layer beside hidden states."""

    args: tuple[Any, ...]
    named: dict[str, Any]


@dataclass
class Call:
    """One call of a module, or of attention."""

    name: str
    module: nn.Module
    inputs: list[Any]
    """Its arguments in order; tensors as they were when it was called."""
    output: Tensor
    """What it returned, as it was then."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of attention."""


class Recording:
    """The calls of one layer, in order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **settings: Any
    ) -> tuple[Tensor, None]:
        """Takes the place of transformers' attention function."""
        out = noise((query.shape[0], query.shape[2], query.shape[1], value.shape[3]), query.dtype)
        self.calls.append(Call(ATTENDED, module, _kept([query, key, value, mask]), out.clone(), settings))
        return out, None

    @contextmanager
    def of(self, layer: nn.Module) -> Iterator[None]:
        """Records all calls of modules of `layer`, as long as the context is open."""
        replaced = [(name, module) for name, module in layer.named_modules() if is_replaced(module)]
        for name, module in replaced:
            module.forward = self._stub(name, module)
        try:
            yield
        finally:
            for _, module in replaced:
                del module.forward

    def _stub(self, name: str, module: nn.Module) -> Any:
        def forward(*args: Any, **named: Any) -> Tensor:
            inputs = [*args, *named.values()]
            given: Tensor = inputs[0]
            width = module.out_features if isinstance(module, nn.Linear) else given.shape[-1]
            out = noise((*given.shape[:-1], width), given.dtype)
            # The layer may change what it got in place.
            self.calls.append(Call(name, module, _kept(inputs), out.clone()))
            return out

        return forward


def record(layer: nn.Module, given: Given, hidden: int, seed: int = SEED) -> tuple[Recording, Tensor, Tensor]:
    """Runs a layer over random hidden states. Returns its calls, its input [T, H] and its output."""
    torch.manual_seed(seed)
    recording = Recording()
    hf.register_attention(recording.attention)
    x = noise((1, TOKENS, hidden), torch.float64)
    kept = x[0].clone()  # The layer may change it.
    with recording.of(layer):
        out = layer(x, *given.args, **given.named)
    return recording, kept, out[0] if isinstance(out, tuple) else out


def explained(where: str, x: Any, values: Values) -> Source:
    """Returns the expression that gives a tensor of a recording. Raises NotKnown if there is none."""
    rows = flat(x) if isinstance(x, Tensor) else None
    source = explain(rows, values) if rows is not None else None
    if source is None:
        raise NotKnown(f"what goes into {where} is not known")
    return source


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: it is called so, and has nothing but a weight and a bias."""
    own = dict(module.named_parameters())
    return "Norm" in type(module).__name__ and not list(module.children()) and set(own) <= {"weight", "bias"}


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the weights of all experts, [E, out, in] or [E, in, out]."""
    own = dict(module.named_parameters(recurse=False))
    return "down_proj" in own and own["down_proj"].ndim == 3


def is_replaced(module: nn.Module) -> bool:
    """Whether a recording takes the place of a module. Its parameters are not needed."""
    return isinstance(module, nn.Linear) or is_norm(module) or is_experts(module)


def noise(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns random numbers, some of them large, so that limits show."""
    out = torch.randn(shape, dtype=torch.float64)
    return torch.where(torch.rand(shape) < 0.1, out * 8, out).to(dtype)


def flat(x: Tensor) -> Tensor | None:
    """Returns a tensor of a recording as [T, W] fp64, or None if it does not have one row for each token."""
    if x.ndim == 4 and x.shape[2] == TOKENS != x.shape[1]:
        x = x.transpose(1, 2)
    if x.ndim > 2 and x.shape[0] == 1:
        x = x[0]
    return x.reshape(TOKENS, -1).double() if x.shape[0] == TOKENS else None


def _kept(inputs: list[Any]) -> list[Any]:
    return [entry.clone() if isinstance(entry, Tensor) else entry for entry in inputs]
