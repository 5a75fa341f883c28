"""All that a stage must know of a model to compute it without transformers, and its form as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import description
from .description import ModelParts

TYPE = "!"
"""Key in JSON under which an object's type stands."""


@dataclass(frozen=True)
class Stored:
    """The checkpoint tensors of one parameter."""

    tensors: tuple[tuple[str, ...], ...]
    """One tensor; or, for a stack of experts, the tensors of each, whose rows follow each other."""
    stacked: bool = False


@dataclass(frozen=True)
class ModelDescription:
    """A model's parts, and where its parameters are in a checkpoint."""

    parts: ModelParts
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    """For each of `parts.layers`: name of a parameter within the layer -> its shape."""
    layers: str
    """Layer i's parameters are called LAYERS.i.NAME."""
    embedding: str
    norm: str
    """Name of the final norm, without the parameter's own."""
    head: str
    """Name of the head, without the parameter's own."""
    tied: bool
    """Whether the embedding's weight serves as the head's, or the reverse, if only one of them is stored."""
    dtype: str | None
    """Dtype that the config names: float32, bfloat16, float16, or None."""
    stored: Mapping[str, Stored]
    """Parameter -> tensors. For those with one tensor of the same name, nothing is said."""
    ignored: str = ""
    """Pattern of tensors that this architecture does not use."""

    def tensors_of(self, parameter: str) -> Stored:
        """Returns the tensors of a parameter, by its whole name."""
        return self.stored.get(parameter) or Stored(((parameter,),))


_TYPES = {
    cls.__name__: cls
    for cls in (*vars(description).values(), Stored, ModelDescription)
    if isinstance(cls, type) and dataclasses.is_dataclass(cls)
}


def to_json(value: Any) -> Any:
    """Returns a description as lists and dictionaries."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {TYPE: type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [to_json(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: to_json(entry) for key, entry in value.items()}
    return value


def from_json(value: Any) -> Any:
    """Returns what `to_json` was given. Raises KeyError and TypeError for anything else."""
    if isinstance(value, list):
        return tuple(from_json(entry) for entry in value)
    if isinstance(value, dict):
        fields = {key: from_json(entry) for key, entry in value.items() if key != TYPE}
        return _TYPES[value[TYPE]](**fields) if TYPE in value else fields
    return value
