"""Finds which rotary embedding a layer applies, from queries or keys before and after it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..description import Rotary
from .explain import same

Angles = tuple[Tensor, Tensor]
"""Cosines and sines, [T, half] or [T, width] fp64."""


def angles_of(given: object) -> Angles | None:
    """Returns a layer's `position_embeddings` as cosines and sines: a pair of tensors, or complex numbers."""
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
        return given[0].reshape(-1, given[0].shape[-1]).double(), given[1].reshape(-1, given[1].shape[-1]).double()
    if isinstance(given, Tensor) and given.is_complex():
        flat = given.reshape(-1, given.shape[-1])
        return flat.real.double(), flat.imag.double()
    return None


def with_angles(given: object, angles: Angles) -> object:
    """Returns `position_embeddings` of the same form with these cosines and sines."""
    if isinstance(given, tuple):
        return tuple(new.reshape(old.shape).to(old.dtype) for new, old in zip(angles, given, strict=True))
    assert isinstance(given, Tensor)
    return torch.complex(*angles).reshape(given.shape).to(given.dtype)


def find_rotary(
    before: Tensor, after: Tensor, angles: Angles, real: Angles, positions: Tensor, frequencies: Iterable[Tensor]
) -> Rotary | None:
    """Returns the rotary embedding that makes `after` of `before`, both [T, heads, size], or None if none does.

    `angles` were applied. `real` are those that the model makes for `positions` [T]. `frequencies`: the tensors, of
    which one must give them.
    """
    turned = (before != after).any(0).any(0).nonzero().flatten()
    if not len(turned):
        return None
    first, width = int(turned[0]), int(turned[-1] - turned[0]) + 1
    half = width // 2
    a, b = before[..., first : first + width], after[..., first : first + width]
    cosines, sines = (part[:, None] for part in angles)
    pairs = {False: (slice(0, half), slice(half, width)), True: (slice(0, width, 2), slice(1, width, 2))}
    # Angles of a width of two halves are there twice. A model may read only the first.
    columns = [(slice(0, half), slice(0, half))]
    if cosines.shape[-1] == width:
        columns += pairs.values()
    for interleaved, (low, high) in pairs.items():
        for of_low, of_high in columns:
            turned_low = a[..., low] * cosines[..., of_low] - a[..., high] * sines[..., of_low]
            turned_high = a[..., high] * cosines[..., of_high] + a[..., low] * sines[..., of_high]
            if width % 2 == 0 and same(b[..., low], turned_low) and same(b[..., high], turned_high):
                found = _frequencies(real[0][:, of_low], real[1][:, of_low], positions, frequencies)
                return None if found is None else Rotary(first, width, interleaved, *found)
    return None


def _frequencies(
    cosines: Tensor, sines: Tensor, positions: Tensor, known: Iterable[Tensor]
) -> tuple[tuple[float, ...], float] | None:
    scale = float((cosines.square() + sines.square()).mean().sqrt())
    for candidate in known:
        if candidate.numel() == cosines.shape[1]:
            angles = positions[:, None].double() * candidate.double().flatten()
            if same(scale * angles.cos(), cosines) and same(scale * angles.sin(), sines):
                return tuple(candidate.float().flatten().tolist()), round(scale, 7)
    return None
