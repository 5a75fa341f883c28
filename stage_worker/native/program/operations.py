"""The operations that kernels compute, over columns of buffers [T, width]. Buffer 0 holds the hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...model.cut import Range
from ...model.parts.description import Attention, Experts, Norm, Rotary

HIDDEN = 0
"""Number of the buffer with the hidden states."""


class NoKernel(Exception):
    """The kernels cannot compute a layer. Says which part of it."""


@dataclass(frozen=True)
class Place:
    """Columns [first, first + width) of a buffer."""

    buffer: int
    first: int
    width: int


@dataclass(frozen=True)
class Rows:
    """Rows of one parameter, in this order; None for all."""

    name: str
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Normalise:
    """Norm over blocks. `order`: the columns of the whole norm that are in `to`, None for all in their order."""

    part: Norm
    source: Place
    to: Place
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Multiply:
    """A linear over one or more weights, one after the other."""

    weights: tuple[Rows, ...]
    biased: frozenset[str]
    """Those of the weights that have a bias."""
    source: Place
    to: Place
    activation: str | None = None
    """Applied to each output; with `gated`, to the first of two weights, which is then multiplied with the second."""
    gated: bool = False
    add: float | None = None
    """The output times this is added to `to`, instead of written to it."""
    inputs: Range | None = None
    """The columns of the weights that this rank has. If not None, outputs are summed over all ranks."""


@dataclass(frozen=True)
class Gather:
    """Copies columns. `runs`: (from, number of the first column in `to`)."""

    runs: tuple[tuple[Place, int], ...]
    to: Place
    clip: float | None = None


@dataclass(frozen=True)
class Combine:
    """Weighted sum of places of one width. `keeps`: `to` is one of the terms, with factor one."""

    terms: tuple[tuple[Place, float], ...]
    to: Place
    keeps: bool
    scale: str | None = None
    """Parameter whose one number multiplies all factors."""


@dataclass(frozen=True)
class Gate:
    """to = factor * activation(gate) * up, or adds that to `to`."""

    activation: str
    gate: Place
    up: Place | None
    repeats: int
    factor: float
    to: Place
    add: bool = False


@dataclass(frozen=True)
class Attend:
    """Rotates queries and keys, writes keys and values to their pages, and attends. Rotated pairs are in halves."""

    part: Attention
    rotary: Rotary | None
    """With the rotated columns first."""
    query: Place
    key: Place
    value: Place
    to: Place
    first_head: int = 0
    """Number of this rank's first head."""
    in_key: bool = False
    """Whether the value is the key's columns after the rotated ones, so that pages hold the key alone."""


@dataclass(frozen=True)
class MultiplyHeads:
    """A linear without bias for each head, over and into columns of its own."""

    name: str
    rows: tuple[tuple[int, ...], ...]
    """For each head: rows of the parameter."""
    transposed: bool
    """Whether outputs are the parameter's columns, not its rows."""
    source: Place
    """Of the first head."""
    source_step: int
    """Columns from one head to the next."""
    to: Place
    to_step: int


@dataclass(frozen=True)
class Mix:
    """A mixture of experts. `logits`: a place, or None if the router's own weight gives them."""

    part: Experts
    source: Place
    logits: Place | None
    to: Place
    whole_width: int
    """Width of one expert, over all ranks."""
    inputs: Range | None = None
    """The part of that width that this rank has. If not None, outputs are summed over all ranks."""


Operation = Normalise | Multiply | Gather | Combine | Gate | Attend | MultiplyHeads | Mix


@dataclass
class Program:
    """Operations of one layer, in order, and the widths of the buffers that they use."""

    operations: list[Operation] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)


def parameters_of(program: Program) -> list[str]:
    """Returns the names of the parameters that a program reads."""
    found: list[str | None] = []
    for operation in program.operations:
        if isinstance(operation, Normalise):
            found += [operation.part.weight, operation.part.bias]
        elif isinstance(operation, Multiply):
            found += [f"{rows.name}.weight" for rows in operation.weights]
            found += [f"{name}.bias" for name in sorted(operation.biased)]
        elif isinstance(operation, MultiplyHeads):
            found.append(f"{operation.name}.weight")
        elif isinstance(operation, Combine):
            found.append(operation.scale)
        elif isinstance(operation, Attend):
            found.append(operation.part.sinks)
        elif isinstance(operation, Mix):
            part, router = operation.part, operation.part.router
            found += [f"{part.name}.gate_up_proj", f"{part.name}.down_proj", router.bias, router.choice_bias]
            found += [f"{part.name}.{name}_proj_bias" for name in ("gate_up", "down") if part.bias]
            found.append(router.logits if operation.logits is None else None)
    return [name for name in dict.fromkeys(found) if name is not None]
