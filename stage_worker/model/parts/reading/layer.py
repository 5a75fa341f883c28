"""Reads the parts of one decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..description import ATTENDED, INPUT, LayerParts, Linear, Part
from .attention import read_attention, read_rotary
from .explain import NotKnown, Values, same
from .mixture import read_experts
from .norms import read_norm
from .record import Call, Given, Recording, explained, flat, is_experts, is_norm, record
from .rotary import angles_of, with_angles


@dataclass(frozen=True)
class Model:
    """What the layers of a model have in common."""

    hidden: int
    frequencies: Sequence[Tensor]
    """Tensors that may be angles per position of the rotary embedding."""
    groups: tuple[int, int]
    """Number of groups of experts, and how many are used for a token."""


def read_layer(index: int, layer: nn.Module, given: Given, model: Model) -> LayerParts:
    """Reads the parts of a layer. Its small parameters are in memory, those of linears and experts need not be.

    Raises:
        NotKnown: something in it is none of the known parts.
    """
    return _LayerReader(index, layer, given, model).read()


def signature(layer: nn.Module, given: Given) -> object:
    """Returns a key. Layers with the same key compute the same."""
    modules = tuple(
        (name, type(module), _settings(module), tuple(p.shape for p in module.parameters(recurse=False)))
        for name, module in layer.named_modules()
    )
    angles = angles_of(given.named.get("position_embeddings"))
    return modules, None if angles is None else (angles[0].shape, float(angles[0].sum()))


class _LayerReader:
    def __init__(self, index: int, layer: nn.Module, given: Given, model: Model) -> None:
        self._index, self._layer, self._model = index, layer, model
        embeddings = given.named.get("position_embeddings")
        self._angles = angles_of(embeddings)
        self._plain = self._turned = given
        if self._angles is not None:
            none = torch.ones_like(self._angles[0]), torch.zeros_like(self._angles[1])
            self._random = torch.randn_like(self._angles[0]), torch.randn_like(self._angles[1])
            self._plain, self._turned = (
                Given(given.args, {**given.named, "position_embeddings": with_angles(embeddings, angles)})
                for angles in (none, self._random)
            )

    def read(self) -> LayerParts:
        scale = self._scale()
        recording, x, out = record(self._layer, self._plain, self._model.hidden)
        turned = recording
        if self._angles is not None:
            turned = record(self._layer, self._turned, self._model.hidden)[0]
        values: dict[str, Tensor] = {INPUT: x}
        parts: list[Part] = []
        for call in recording.calls:
            where = f"{call.name} of layer {self._index}"
            parts.append(self._part(where, call, turned, values))
            value = flat(call.output)
            if value is None:
                raise NotKnown(f"{where} does not give one row for each token")
            values[call.name] = value
        return LayerParts(tuple(parts), explained(f"the output of layer {self._index}", out, values), scale)

    def _scale(self) -> str | None:
        """Returns the name of a stored number that multiplies the output. Sets it to one."""
        numbers = [(name, tensor) for name, tensor in self._layer.state_dict().items() if tensor.numel() == 1]
        if not numbers:
            return None
        name, tensor = numbers[0]
        outputs = []
        for value in (3.0, 1.0):
            tensor.fill_(value)
            outputs.append(record(self._layer, self._plain, self._model.hidden)[2])
        if len(numbers) > 1 or not same(outputs[0], 3 * outputs[1]):
            raise NotKnown(
                f"what the numbers {', '.join(n for n, _ in numbers)} of layer {self._index} do is not known"
            )
        return name

    def _part(self, where: str, call: Call, turned: Recording, values: Values) -> Part:
        if call.name == ATTENDED:
            rotary = None
            if self._angles is not None:
                again = next(other for other in turned.calls if other.name == ATTENDED)
                rotary = read_rotary(where, call, again, self._random, self._angles, self._model.frequencies)
            return read_attention(where, self._layer, call, values, rotary)
        source = explained(where, call.inputs[0], values)
        if is_experts(call.module):
            return read_experts(where, self._layer, self._plain, call, source, self._model.groups)
        if is_norm(call.module):
            return read_norm(call.name, call.module, source, call.inputs[0].shape[-1])
        return Linear(call.name, source, getattr(call.module, "bias", None) is not None)


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """A module's own plain attributes, but for its number."""
    plain = (int, float, str, bool, type(None))
    own = ((name, value) for name, value in vars(module).items() if not name.startswith("_") and name != "layer_idx")
    return tuple(sorted((name, repr(value)) for name, value in own if isinstance(value, plain)))
