"""What expressions over a layer's values read, and how wide they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...model.parts.description import (
    INPUT,
    Attention,
    Blend,
    Columns,
    Experts,
    Gated,
    LayerParts,
    Linear,
    Norm,
    Source,
    Sum,
)


def owned_sources(layer: LayerParts) -> list[tuple[str, Source]]:
    """Returns all expressions of a layer in order, each with the part that reads it; "" reads the output."""
    found: list[tuple[str, Source]] = []
    for part in layer.parts:
        if isinstance(part, Attention):
            found += [(part.name, source) for source in (part.query, part.key, part.value)]
        else:
            found.append((part.name, part.source))
            if isinstance(part, Experts):
                found.append((part.name, Columns(((part.router.logits, 0, part.count),))))
    return [*found, ("", layer.output)]


def widths(layer: LayerParts, hidden: int, outputs: Mapping[str, int]) -> dict[str, int]:
    """Returns the number of columns of each value. `outputs`: of each linear."""
    found = {INPUT: hidden}
    for part in layer.parts:
        if isinstance(part, Linear):
            found[part.name] = outputs[part.name]
        elif isinstance(part, Norm):
            found[part.name] = width(part.source, found)
        else:
            found[part.name] = part.heads * part.value_dim if isinstance(part, Attention) else hidden
    return found


def width(source: Source, of: Mapping[str, int]) -> int:
    """Returns the number of columns of an expression."""
    if isinstance(source, Columns):
        return sum(last - first for _, first, last in source.runs)
    if isinstance(source, Gated):
        return width(source.gate if source.up is None else source.up, of)
    return of[next(iter(names(source)))]


def whole(source: Source | None, of: Mapping[str, int]) -> str | None:
    """Returns the value of which an expression is all columns in order, if it is that."""
    if isinstance(source, Columns) and source.clip is None and len(source.runs) == 1:
        name, first, last = source.runs[0]
        return name if (first, last) == (0, of.get(name)) else None
    if isinstance(source, Sum) and len(source.terms) == 1 and source.terms[0][1] == 1.0:
        return source.terms[0][0]
    return None


def key(source: Source) -> str:
    """Returns a name for an expression's value."""
    return repr(source)


def names(source: Source) -> set[str]:
    """Returns the values that an expression reads."""
    if isinstance(source, Sum):
        return {name for name, _ in source.terms}
    if isinstance(source, Columns):
        return {name for name, _, _ in source.runs}
    if isinstance(source, Gated):
        return names(source.gate) | (names(source.up) if source.up is not None else set())
    assert isinstance(source, Blend)
    return set().union(*map(names, source.parts))


def terms(source: Source) -> dict[str, float]:
    """Returns value -> factor of the plain terms of a sum."""
    if isinstance(source, Sum):
        return dict(source.terms)
    if isinstance(source, Blend):
        return {name: factor for part in source.parts if isinstance(part, Sum) for name, factor in part.terms}
    return {}


def columns(source: Columns) -> Iterator[tuple[str, int]]:
    for name, first, last in source.runs:
        for column in range(first, last):
            yield name, column
