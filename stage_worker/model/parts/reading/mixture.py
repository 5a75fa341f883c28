"""Describes a mixture of experts from recorded calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..description import INPUT, Experts, Router, Source
from .experts import find_experts
from .explain import NotKnown
from .record import SEED, TOKENS, Call, Given, flat, record
from .router import find_router

RECORDINGS = 40
"""Number of recordings from which a router is found. Ways to choose differ for few tokens only."""


@dataclass
class _Choices:
    """What the experts were given for many tokens, and what it may have been made of."""

    chosen: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    logits: dict[str, list[Tensor]] = field(default_factory=dict)


def read_experts(
    where: str, layer: nn.Module, given: Given, call: Call, source: Source, groups: tuple[int, int]
) -> Experts:
    """Describes a call of the experts of `layer`. `groups`: number of groups of experts, and how many are used.

    Raises:
        NotKnown: how experts are chosen, or what they compute, is none of the known.
    """
    hidden = call.inputs[0].shape[-1]
    count = len(next(call.module.parameters()))
    tables: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if not tensor.is_meta and tensor.shape == (count, hidden):
            tables[name] = tensor.double()
        elif not tensor.is_meta and tensor.numel() == count:
            biases[name] = tensor.double().flatten()
    choices = _choices(where, layer, given, call.name, hidden, count, tables)
    logits = {name: torch.cat(values) for name, values in choices.logits.items()}
    router = find_router(torch.cat(choices.chosen), torch.cat(choices.weights), logits, biases, groups)
    if router is None:
        raise NotKnown(f"how {where} are chosen is not known")
    return _described(where, call, source, router)


def _described(where: str, call: Call, source: Source, router: Router) -> Experts:
    found = find_experts(call.name, call.module, source, router)
    if found is None:
        raise NotKnown(f"{where} ({type(call.module).__name__}) computes what no known expert does")
    return found


def _choices(
    where: str,
    layer: nn.Module,
    given: Given,
    experts: str,
    hidden: int,
    count: int,
    tables: Mapping[str, Tensor],
) -> _Choices:
    choices = _Choices()
    for seed in range(SEED + 1, SEED + 1 + RECORDINGS):
        recording, x, _ = record(layer, given, hidden, seed)
        values = {INPUT: x}
        for call in recording.calls:
            if call.name == experts:
                _add(choices, where, call, values, count, tables)
                break
            value = flat(call.output)
            if value is not None:
                values[call.name] = value
    return choices


def _add(
    choices: _Choices,
    where: str,
    call: Call,
    values: Mapping[str, Tensor],
    count: int,
    tables: Mapping[str, Tensor],
) -> None:
    rows = flat(call.inputs[0])
    tensors = [x.reshape(TOKENS, -1) for x in call.inputs[1:] if isinstance(x, Tensor)]
    floats = [x.is_floating_point() for x in tensors]
    if rows is None or sorted(floats) != [False, True] or tensors[0].shape != tensors[1].shape:
        raise NotKnown(f"{where} are not given experts and weights for each token")
    choices.chosen.append(tensors[floats.index(False)])
    choices.weights.append(tensors[floats.index(True)].double())
    known = {name: value for name, value in values.items() if value.shape[1] == count}
    known |= {name: rows @ table.T for name, table in tables.items()}
    for name, value in known.items():
        choices.logits.setdefault(name, []).append(value)
