"""What a model is made of: the parts of each decoder layer in the order in which they run, and both ends.

A layer computes named values, each [T, W] for T tokens. "x" is its input. Every other value is the output of one of its
modules, and has the module's name. What goes into a module is an expression over earlier values.
"""

from __future__ import annotations

from dataclasses import dataclass

INPUT = "x"
"""Name of a layer's input."""
ATTENDED = "attention"
"""Name of the output of attention, before the output projection."""


@dataclass(frozen=True)
class Sum:
    """Sum of factor * value, over values of one width."""

    terms: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Columns:
    """Columns of values side by side."""

    runs: tuple[tuple[str, int, int], ...]
    """(value, first column, one past its last column)."""
    clip: float | None = None
    """Every number is limited to [-clip, clip]."""


@dataclass(frozen=True)
class Gated:
    """activation(gate) * up, elementwise; without `up`, activation(gate)."""

    activation: str
    gate: Source
    up: Source | None = None
    repeats: int = 1
    """One number of the gate serves this many neighbouring columns of `up`: one gate for a head, or for all."""
    factor: float = 1.0


@dataclass(frozen=True)
class Blend:
    """Sum of expressions."""

    parts: tuple[Source, ...]


Source = Sum | Columns | Gated | Blend


@dataclass(frozen=True)
class Norm:
    """RMS norm, or layer norm with the mean taken out, over blocks of `width` columns."""

    name: str
    source: Source
    width: int
    centred: bool
    eps: float
    weight: str | None
    """Name of the parameter, [width] or one row of it for each block; None for ones."""
    weight_offset: float = 0.0
    """Added to the weight: 1 in Gemma."""
    bias: str | None = None
    rounds: bool = True
    """Whether normalised numbers are rounded to the model's dtype before they are weighed."""


@dataclass(frozen=True)
class Linear:
    """A linear over the source: y = x W^T + b."""

    name: str
    source: Source
    bias: bool


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of a part of each head. Column i of the part is paired with i + half, or 2 i with 2 i + 1."""

    first: int
    width: int
    interleaved: bool
    frequencies: tuple[float, ...]
    """Angle per position of each pair, [width / 2]."""
    scale: float = 1.0
    """Factor of cosines and sines."""


@dataclass(frozen=True)
class Attention:
    """Causal attention. Queries, keys and values are [T, heads * size], head after head."""

    query: Source
    key: Source
    value: Source
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    rotary: Rotary | None
    window: int | None = None
    softcap: float | None = None
    sinks: str | None = None
    """Name of the parameter [heads] that joins each softmax as a logit without a value."""
    name: str = ATTENDED


@dataclass(frozen=True)
class Router:
    """Chooses `used` experts for a token from logits [T, E], and their weights."""

    logits: str
    """A value, or the name of the parameter [E, W] that is multiplied with the experts' input."""
    bias: str | None
    """Parameter [E], added to the logits."""
    scores: str
    """softmax, sigmoid or none: what makes scores of the logits."""
    choice_bias: str | None
    """Parameter or buffer [E], added to the scores when experts are chosen, but not when they are weighed."""
    used: int
    groups: int = 1
    groups_used: int = 1
    group_top: int = 1
    """A group's score is the sum of this many of its best."""
    chosen_by_logits: bool = False
    """Whether logits, and not scores, decide who is chosen."""
    softmax_of_chosen: bool = False
    normalise: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: the sum of weight * expert(source) over the chosen ones."""

    name: str
    source: Source
    router: Router
    count: int
    width: int
    """Width of one expert's gate, and of its `up`."""
    activation: str
    """Of the gate; or "swiglu_oss", GPT-OSS's own function of both."""
    transposed: bool
    """Whether the parameters are [E, in, out], not [E, out, in]."""
    interleaved: bool
    """Whether gates are the even outputs of `gate_up_proj`, not its first half."""
    bias: bool


Part = Norm | Linear | Attention | Experts


@dataclass(frozen=True)
class LayerParts:
    """One kind of decoder layer."""

    parts: tuple[Part, ...]
    output: Source
    scale: str | None = None
    """Name of a stored number that multiplies the output."""


@dataclass(frozen=True)
class ModelParts:
    """A whole decoder."""

    hidden: int
    vocab: int
    layers: tuple[LayerParts, ...]
    kinds: tuple[int, ...]
    """For each decoder layer, which of `layers` it is."""
    embedding_scale: float
    final_norm: Norm
    head_bias: bool
    logits_scale: float
    logits_softcap: float | None
    """Logits are softcap * tanh(logits / softcap)."""
