"""Divides a layer among the ranks of a tensor-parallel group.

Heads of attention, columns between gate and down, and the width of each expert are divided (after Megatron-LM). A
linear over divided columns has only its part of the inputs, so its outputs are summed over all ranks. All else is
derived backwards from there: a rank computes the columns that it needs of each value, and has the rows of the weights
for them. If a norm needs a whole value, each rank computes all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...model.cut import Range, even_range
from ...model.parts.description import (
    Attention,
    Columns,
    Experts,
    Gated,
    LayerParts,
    Linear,
    Norm,
    Part,
    Source,
    Sum,
)
from .expressions import columns, names, owned_sources, width, widths
from .operations import NoKernel

UNIT = 32
"""Columns between gate and down are divided in blocks of this size, or of a part of it down to a pair."""


@dataclass
class RankLayer:
    """One rank's part of a layer."""

    layer: LayerParts
    """The parts, over values that have the rank's columns only."""
    columns: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Value -> which of its columns the rank has. Values that are not here are whole."""
    inputs: dict[str, Range] = field(default_factory=dict)
    """Linear or experts -> the rank's part of their input columns or width. Their outputs are summed over all ranks."""
    heads: Range | None = None
    """The rank's heads."""
    widths: dict[str, int] = field(default_factory=dict)
    """Experts -> width of one, over all ranks."""


def partition(layer: LayerParts, hidden: int, width_of: Mapping[str, int], size: int, rank: int) -> RankLayer:
    """Returns the part of a layer that rank `rank` of `size` computes. `width_of`: outputs of each linear.

    Raises:
        NoKernel: the layer cannot be divided like this.
    """
    return RankLayer(layer) if size == 1 else _Partition(layer, hidden, width_of, size, rank).partition()


class _Partition:
    def __init__(self, layer: LayerParts, hidden: int, width_of: Mapping[str, int], size: int, rank: int) -> None:
        self._layer, self._size, self._rank = layer, size, rank
        self._width = widths(layer, hidden, width_of)
        self._needed: dict[str, set[int]] = {name: set() for name in self._width}
        self._columns: dict[str, tuple[int, ...]] = {}
        self._inputs: dict[str, Range] = {}
        self._heads: dict[str, Range] = {}
        self._at: dict[str, dict[int, int]] = {}

    def partition(self) -> RankLayer:
        attended = {part.name for part in self._layer.parts if isinstance(part, Attention)}
        for part in self._layer.parts:
            if isinstance(part, Attention):
                self._heads[part.name] = self._part_of(part.heads, 1)
            elif isinstance(part, Experts):
                self._inputs[part.name] = self._part_of(part.width, UNIT)
            elif isinstance(part, Linear) and names(part.source) & attended:
                self._inputs[part.name] = self._of_attention(part)
            elif isinstance(part, Linear) and self._is_between(part):
                self._inputs[part.name] = self._part_of(width(part.source, self._width), UNIT)
        self._need(self._layer.output, None)
        for part in reversed(self._layer.parts):
            self._need_of(part)
        parts = tuple(map(self._divided, self._layer.parts))
        whole = {part.name: part.width for part in self._layer.parts if isinstance(part, Experts)}
        heads = next(iter(self._heads.values()), None)
        return RankLayer(replace(self._layer, parts=parts), self._columns, self._inputs, heads, whole)

    def _part_of(self, count: int, unit: int) -> Range:
        """Returns the rank's part of `count` columns or heads, in whole units if that leaves the parts equal."""
        while unit > 2 and count % (unit * self._size):
            unit //= 2
        if count % unit or count // unit < self._size or (unit == 1 and count % self._size):
            raise NoKernel(f"{count} heads or columns do not divide by {self._size} ranks")
        first, last = even_range(count // unit, self._size, self._rank)
        return first * unit, last * unit

    def _of_attention(self, part: Linear) -> Range:
        attention = next(a for a in self._layer.parts if isinstance(a, Attention) and a.name in names(part.source))
        first, last = self._heads[attention.name]
        if width(part.source, self._width) != attention.heads * attention.value_dim:
            raise NoKernel(f"{part.name} reads more than attention's output")
        return first * attention.value_dim, last * attention.value_dim

    def _is_between(self, part: Linear) -> bool:
        """Whether a linear reads a gated value of linears that nothing else reads, such as an MLP's down projection."""
        source = part.source
        linears = {other.name for other in self._layer.parts if isinstance(other, Linear)}
        if not isinstance(source, Gated) or source.repeats != 1 or not names(source) <= linears:
            return False
        readers = [owner for owner, other in owned_sources(self._layer) if names(other) & names(source)]
        return readers == [part.name]

    def _need_of(self, part: Part) -> None:
        """Adds what this part needs of earlier values."""
        needed = self._needed[part.name]
        if isinstance(part, Attention):
            (first, last), group = self._heads[part.name], part.heads // part.kv_heads
            kv = first // group, (last - 1) // group + 1
            if (last - first) % (kv[1] - kv[0]) or (kv[1] - kv[0] > 1 and first % group):
                raise NoKernel(f"{part.kv_heads} KV heads do not divide by {self._size} ranks")
            own = _block(first, last, part.value_dim)
            if not needed <= set(own):
                raise NoKernel("each rank needs the attention of all heads")
            self._columns[part.name] = own
            self._need(part.query, _block(first, last, part.head_dim))
            self._need(part.key, _block(*kv, part.head_dim))
            self._need(part.value, _block(*kv, part.value_dim))
            return
        if isinstance(part, Norm):
            blocks = sorted({column // part.width for column in needed})
            own = tuple(column for at in blocks for column in _block(at, at + 1, part.width))
            self._set(part.name, own)
            self._need(part.source, own)
            return
        if isinstance(part, Linear):
            self._set(part.name, tuple(sorted(needed)))
            inputs = self._inputs.get(part.name)
            self._need(part.source, range(*inputs) if inputs is not None else None)
            return
        self._need(part.source, None)
        if part.router.logits in self._width:
            self._needed[part.router.logits].update(range(part.count))

    def _set(self, name: str, own: tuple[int, ...]) -> None:
        if len(own) < self._width[name]:
            self._columns[name] = own

    def _need(self, source: Source, wanted: Iterable[int] | None) -> None:
        """Adds columns of an expression; None for all."""
        if isinstance(source, Gated):
            some = list(range(width(source, self._width)) if wanted is None else wanted)
            self._need(source.gate, sorted({column // source.repeats for column in some}))
            if source.up is not None:
                self._need(source.up, some)
        elif isinstance(source, Columns):
            every = list(columns(source))
            for at in range(len(every)) if wanted is None else wanted:
                name, column = every[at]
                self._needed[name].add(column)
        elif isinstance(source, Sum):
            some = list(range(width(source, self._width)) if wanted is None else wanted)
            for name, _ in source.terms:
                self._needed[name].update(some)
        else:
            for part in source.parts:
                self._need(part, wanted)

    def _divided(self, part: Part) -> Part:
        """Returns a part over the rank's columns."""
        if isinstance(part, Attention):
            (first, last), group = self._heads[part.name], part.heads // part.kv_heads
            kv = first // group, (last - 1) // group + 1
            return replace(
                part,
                query=self._pick(part.query, _block(first, last, part.head_dim)),
                key=self._pick(part.key, _block(*kv, part.head_dim)),
                value=self._pick(part.value, _block(*kv, part.value_dim)),
                heads=last - first,
                kv_heads=kv[1] - kv[0],
            )
        if isinstance(part, Norm) and part.name in self._columns:
            return replace(part, source=self._pick(part.source, self._columns[part.name]))
        if isinstance(part, Linear) and part.name in self._inputs:
            return replace(part, source=self._pick(part.source, range(*self._inputs[part.name])))
        if isinstance(part, Experts):
            first, last = self._inputs[part.name]
            return replace(part, width=last - first)
        if any(name in self._columns for name in names(part.source)):
            return replace(part, source=self._pick(part.source, range(width(part.source, self._width))))
        return part

    def _pick(self, source: Source, wanted: Sequence[int]) -> Source:
        """Returns the expression of these columns of an expression, over the rank's columns of each value."""
        if isinstance(source, Columns):
            every = list(columns(source))
            return replace(source, runs=_runs((every[at][0], self._local(*every[at])) for at in wanted))
        if isinstance(source, Gated):
            gates = sorted({column // source.repeats for column in wanted})
            if len(wanted) % len(gates):
                raise NoKernel("a gate is for columns of several ranks")
            up = self._pick(source.up, wanted) if source.up is not None else None
            return replace(source, gate=self._pick(source.gate, gates), up=up, repeats=len(wanted) // len(gates))
        own = {self._columns.get(name) for name in names(source)}
        if own != {None} and own != {tuple(wanted)}:
            raise NoKernel("a sum of different columns")
        return source

    def _local(self, name: str, column: int) -> int:
        if name not in self._columns:
            return column
        if name not in self._at:
            self._at[name] = {own: at for at, own in enumerate(self._columns[name])}
        return self._at[name][column]


def _block(first: int, last: int, size: int) -> tuple[int, ...]:
    """Returns the columns of blocks [first, last) of this size."""
    return tuple(range(first * size, last * size))


def _runs(picked: Iterable[tuple[str, int]]) -> tuple[tuple[str, int, int], ...]:
    runs: list[tuple[str, int, int]] = []
    for name, column in picked:
        if runs and runs[-1][0] == name and runs[-1][2] == column:
            runs[-1] = name, runs[-1][1], column + 1
        else:
            runs.append((name, column, column + 1))
    return tuple(runs)
