"""Finds multi-head latent attention (MLA, DeepSeek V2). Its pages hold the latent, not each head's key and value.

There, all keys (but for a rotated part that all heads share) and all values are products of one narrow value, the
latent. So q . (W c) is computed as (W^T q) . c, and the sum of weight * (W c) as W (sum of weight * c).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...model.parts.description import Attention, Columns, LayerParts, Linear
from .expressions import columns, names, owned_sources


@dataclass(frozen=True)
class Latent:
    """How keys and values are made of a latent."""

    linear: Linear
    """The linear over the latent. Nothing else reads it."""
    key_rows: tuple[tuple[int, ...], ...]
    """For each head: the rows of its weight for the part of the key that is not rotated, [nope]."""
    value_rows: tuple[tuple[int, ...], ...]
    """For each head: the rows for the value."""
    shared: tuple[tuple[str, int], ...]
    """(value, column) of the rotated part, in the order of the head's columns."""


def find_latent(layer: LayerParts, part: Attention) -> Latent | None:
    """Returns the latent of attention, or None if its keys and values are not made of one."""
    rotary = part.rotary
    if part.kv_heads != part.heads or rotary is None:
        return None
    if not isinstance(part.key, Columns) or not isinstance(part.value, Columns):
        return None
    if part.key.clip is not None or part.value.clip is not None:
        return None
    value_names = names(part.value)
    linears = [other for other in layer.parts if isinstance(other, Linear) and {other.name} == value_names]
    if len(linears) != 1 or linears[0].bias:
        return None
    readers = {owner for owner, source in owned_sources(layer) if value_names & names(source)}
    if readers != {part.name}:
        return None
    keys, values = list(columns(part.key)), list(columns(part.value))
    heads = [keys[at * part.head_dim : (at + 1) * part.head_dim] for at in range(part.heads)]
    rotated = range(rotary.first, rotary.first + rotary.width)
    shared = tuple(heads[0][at] for at in rotated)
    if any(name in value_names for name, _ in shared) or any(
        tuple(head[at] for at in rotated) != shared for head in heads
    ):
        return None
    own = [[head[at] for at in range(part.head_dim) if at not in rotated] for head in heads]
    if any(name not in value_names for head in own for name, _ in head):
        return None
    size = part.value_dim
    of_values = [values[at * size : (at + 1) * size] for at in range(part.heads)]
    return Latent(
        linears[0],
        tuple(tuple(row for _, row in head) for head in own),
        tuple(tuple(row for _, row in head) for head in of_values),
        shared,
    )
