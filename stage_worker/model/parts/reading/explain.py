"""Finds by numbers how a tensor was made of earlier ones.

Every earlier value is random, so an expression that gives the same numbers for all tokens is the one that the code
computed: columns taken from values, a weighted sum, an activation of one value times another. Chance could not do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..description import Blend, Columns, Gated, Source, Sum

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}
GATES = ("sigmoid", "softplus")
"""Activations of a gate that is narrower than what it multiplies."""
_SOLVED = 8192
"""Largest number of equations that are solved. All others are checked."""

Values = Mapping[str, Tensor]
"""Value name -> [T, W] fp64."""


class NotKnown(Exception):
    """A model does something that is none of the known parts. Says what, and in which layer."""


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for the rounding of fp32."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def explain(x: Tensor, values: Values) -> Source | None:
    """Returns the expression that gives `x` [T, W] fp64, or None if there is none of the known forms."""
    return _columns(x, values) or _sum(x, values) or _gated(x, values)


def evaluate(source: Source, values: Values) -> Tensor:
    """Computes an expression, [T, W]."""
    if isinstance(source, Sum):
        return torch.stack([factor * values[name] for name, factor in source.terms]).sum(0)
    if isinstance(source, Columns):
        out = torch.cat([values[name][:, first:last] for name, first, last in source.runs], dim=1)
        return out if source.clip is None else out.clamp(-source.clip, source.clip)
    if isinstance(source, Gated):
        gate = ACTIVATIONS[source.activation](evaluate(source.gate, values))
        if source.up is None:
            return source.factor * gate
        up = evaluate(source.up, values)
        return source.factor * gate.repeat_interleave(up.shape[1] // gate.shape[1], dim=1) * up
    return torch.stack([evaluate(part, values) for part in source.parts]).sum(0)


def whole(name: str, value: Tensor) -> Columns:
    """Returns the expression for all columns of one value."""
    return Columns(((name, 0, value.shape[1]),))


def _columns(x: Tensor, values: Values) -> Columns | None:
    most = x.abs().max().item()
    clip = most if int((x.abs() == most).sum()) > 2 else None
    places: dict[bytes, tuple[str, int]] = {}
    for name, value in values.items():
        known = value if clip is None else value.clamp(-clip, clip)
        places.update((key, (name, column)) for column, key in enumerate(_keys(known)))
    runs: list[tuple[str, int, int]] = []
    for key in _keys(x):
        if key not in places:
            return None
        name, column = places[key]
        if runs and runs[-1][0] == name and runs[-1][2] == column:
            runs[-1] = name, runs[-1][1], column + 1
        else:
            runs.append((name, column, column + 1))
    return Columns(tuple(runs), clip)


def _keys(x: Tensor) -> list[bytes]:
    """One key for each column: its numbers for all tokens, as fp32."""
    rows = x.T.float().add(0.0).contiguous().numpy()  # Adding zero makes -0 and 0 the same.
    return [row.tobytes() for row in rows]


def _sum(x: Tensor, values: Values) -> Source | None:
    parts: list[tuple[Source, Tensor]] = []
    for name, value in values.items():
        if value.shape == x.shape:
            parts.append((Sum(((name, 1.0),)), value))
            parts += [(gated, evaluate(gated, values)) for gated in _gates_of_tokens(name, value, values)]
    if not parts:
        return None
    matrix = torch.stack([value.flatten() for _, value in parts], 1)
    wanted = x.flatten()
    rows = slice(None, None, max(1, len(wanted) // _SOLVED))
    factors = torch.linalg.lstsq(matrix[rows], wanted[rows, None]).solution[:, 0]
    if not torch.allclose(matrix @ factors, wanted, rtol=1e-4, atol=1e-4):
        return None
    terms: list[tuple[str, float]] = []
    gated_parts: list[Source] = []
    for (part, _), factor in zip(parts, (_plain(f) for f in factors.tolist()), strict=True):
        if factor == 0.0:
            continue
        if isinstance(part, Sum):
            terms.append((part.terms[0][0], factor))
        elif isinstance(part, Gated):
            gated_parts.append(Gated(part.activation, part.gate, part.up, part.repeats, factor))
    total = Sum(tuple(terms))
    return Blend((total, *gated_parts)) if gated_parts else total


def _plain(factor: float) -> float:
    """Takes the noise of a solution away: 0.99999997 is one, 3e-9 is nothing."""
    nearest = float(f"{factor:.5g}")
    return 0.0 if abs(factor) < 1e-5 else nearest if abs(nearest - factor) < 2e-6 * abs(nearest) else factor


def _gates_of_tokens(name: str, value: Tensor, values: Values) -> Iterator[Gated]:
    """One gate for a whole token, as a shared expert has."""
    for gate_name, gate in values.items():
        if gate.shape[1] == 1 < value.shape[1]:
            yield Gated("sigmoid", whole(gate_name, gate), whole(name, value), value.shape[1])


def _gated(x: Tensor, values: Values) -> Gated | None:
    width = x.shape[1]
    parts = [(part, evaluate(part, values)) for part in _of_width(width, values)]
    for gate_source, gate in parts:
        for activation, function in ACTIVATIONS.items():
            opened = function(gate)
            if same(opened, x):
                return Gated(activation, gate_source)
            for up_source, up in parts:
                if same(opened * up, x):
                    return Gated(activation, gate_source, up_source)
    for name, gate in values.items():
        repeats = width // gate.shape[1]
        if repeats > 1 and gate.shape[1] * repeats == width:
            for activation in GATES:
                opened = ACTIVATIONS[activation](gate).repeat_interleave(repeats, dim=1)
                for up_source, up in parts:
                    if same(opened * up, x):
                        return Gated(activation, whole(name, gate), up_source, repeats)
    return None


def _of_width(width: int, values: Values) -> Iterator[Columns]:
    """Values of this width, both halves of those of twice the width, and their even and odd columns."""
    for name, value in values.items():
        if value.shape[1] == width:
            yield whole(name, value)
        elif value.shape[1] == 2 * width:
            yield Columns(((name, 0, width),))
            yield Columns(((name, width, 2 * width),))
            for odd in (0, 1):
                yield Columns(tuple((name, 2 * at + odd, 2 * at + odd + 1) for at in range(width)))
