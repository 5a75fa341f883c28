"""The order in which attention wants the columns of queries and keys."""

from __future__ import annotations

from dataclasses import replace

from ...model.parts.description import Rotary


def halves(rotary: Rotary | None, head_dim: int) -> tuple[Rotary | None, tuple[int, ...] | None]:
    """Returns the embedding with the rotated columns first and in two halves, and the order of a head's columns."""
    if rotary is None:
        return None, None
    inside = list(range(rotary.first, rotary.first + rotary.width))
    if rotary.interleaved:
        inside = inside[::2] + inside[1::2]
    order = (*inside, *(at for at in range(head_dim) if at not in inside))
    plain = order == tuple(range(head_dim))
    return replace(rotary, first=0, interleaved=False), None if plain else order


def of_heads(order: tuple[int, ...] | None, heads: int) -> tuple[int, ...] | None:
    """Repeats the order of one head for all heads."""
    if order is None:
        return None
    return tuple(head * len(order) + at for head in range(heads) for at in order)
