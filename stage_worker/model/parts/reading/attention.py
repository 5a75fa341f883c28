"""Describes attention from a recorded call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..description import Attention, Rotary
from .explain import NotKnown, Values
from .record import POSITIONS, Call, explained
from .rotary import Angles, find_rotary


def read_attention(where: str, layer: nn.Module, call: Call, values: Values, rotary: Rotary | None) -> Attention:
    """Describes a call of attention, recorded without rotation.

    Raises:
        NotKnown: it is not causal, or its queries, keys and values come from nothing known.
    """
    query, key, value, mask = call.inputs
    settings = call.settings
    if mask is not None or settings.get("is_causal") is False or getattr(call.module, "is_causal", True) is False:
        raise NotKnown(f"{where} is not causal, or has a mask of its own")
    scale = settings.get("scaling")
    return Attention(
        query=explained(f"queries of {where}", query.transpose(1, 2), values),
        key=explained(f"keys of {where}", key.transpose(1, 2), values),
        value=explained(f"values of {where}", value.transpose(1, 2), values),
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        scale=float(query.shape[3] ** -0.5 if scale is None else scale),
        rotary=rotary,
        window=settings.get("sliding_window"),
        softcap=settings.get("softcap"),
        sinks=_sinks(where, layer, settings.get("s_aux")),
    )


def read_rotary(
    where: str, plain: Call, turned: Call, angles: Angles, real: Angles, frequencies: Iterable[Tensor]
) -> Rotary | None:
    """Finds the rotary embedding from two recordings of the same random numbers, without rotation and with `angles`.

    `real` are the angles that the model makes for `POSITIONS`, from one of `frequencies`.

    Raises:
        NotKnown: it is none of the known, or queries and keys are rotated in different ways.
    """
    known = list(frequencies)
    found: list[Rotary | None] = []
    for before, after in zip(plain.inputs[:2], turned.inputs[:2], strict=True):
        if torch.equal(before, after):
            found.append(None)
            continue
        rows = [x[0].transpose(0, 1).double() for x in (before, after)]
        rotary = find_rotary(rows[0], rows[1], angles, real, POSITIONS, known)
        if rotary is None:
            raise NotKnown(f"the rotary embedding of {where} is none of the known")
        found.append(rotary)
    if found[0] != found[1]:
        raise NotKnown(f"{where} rotates queries and keys in different ways")
    return found[0]


def _sinks(where: str, layer: nn.Module, sinks: Tensor | None) -> str | None:
    if sinks is None:
        return None
    for name, parameter in layer.named_parameters():
        if parameter is sinks:
            return name
    raise NotKnown(f"the sinks of {where} are not one of its parameters")
