"""Turns the parts of a layer into a list of kernel operations over buffers, with as few passes over memory as possible.

What is multiplied with the same input becomes one linear. A linear whose output goes through an activation, or is only
added to the hidden states, does that while it writes.

The order of a value's columns is free: rows of the weights that make it are read in the order in which attention wants
them. So a head's pairs of rotated columns are in two halves, whatever the checkpoint's order is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

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
    Part,
    Rotary,
    Source,
    Sum,
)
from .expressions import columns, key, names, owned_sources, terms, whole, widths
from .heads import halves, of_heads
from .latent import Latent, find_latent
from .operations import (
    HIDDEN,
    Attend,
    Combine,
    Gate,
    Gather,
    Mix,
    Multiply,
    MultiplyHeads,
    NoKernel,
    Normalise,
    Operation,
    Place,
    Program,
    Rows,
)
from .partition import RankLayer, partition


def compile_layer(layer: LayerParts, hidden: int, width_of: Mapping[str, int], size: int = 1, rank: int = 0) -> Program:
    """Compiles the part of a layer that rank `rank` of `size` computes.

    `width_of`: the number of outputs of each of its linears.

    Raises:
        NoKernel: some part has no kernel, or the layer cannot be divided among the ranks.
    """
    return _Compiler(partition(layer, hidden, width_of, size, rank), hidden, width_of).compile()


class _Compiler:
    def __init__(self, own: RankLayer, hidden: int, width_of: Mapping[str, int]) -> None:
        self._own, self._layer, self._hidden = own, own.layer, hidden
        own_widths = {name: len(own.columns.get(name, range(count))) for name, count in width_of.items()}
        self._width = widths(own.layer, hidden, own_widths)
        self._reads = owned_sources(own.layer)
        self._program = Program(widths=[hidden])
        self._places: dict[str, Place] = {INPUT: Place(HIDDEN, 0, hidden)}
        self._order: dict[str, tuple[int, ...]] = {}
        """For values that are not in their own order: which column of theirs each column in memory is."""
        self._held: dict[str, float] = {INPUT: 1.0}
        """What buffer 0 is the sum of."""
        attentions = [part for part in own.layer.parts if isinstance(part, Attention)]
        self._latents = {part.name: latent for part in attentions if (latent := find_latent(own.layer, part))}
        self._done = {latent.linear.name for latent in self._latents.values()}

    def compile(self) -> Program:
        parts = self._layer.parts
        for at, part in enumerate(parts):
            if part.name not in self._done:
                self._part(at, part)
        self._finish()
        if self._layer.scale is not None:
            x = self._places[INPUT]
            self._emit(Combine(((x, 1.0),), x, keeps=False, scale=self._layer.scale))
        return self._program

    def _part(self, at: int, part: Part) -> None:
        if isinstance(part, Linear):
            self._linear(at, part)
        elif isinstance(part, Norm):
            self._norm(part)
        elif isinstance(part, Attention):
            self._attention(part)
        else:
            self._mix(part)

    def _norm(self, part: Norm) -> None:
        name = self._whole(part.source)
        order = self._order.get(name) if name is not None else None
        if name is not None and order is not None:
            source, self._order[part.name] = self._places[name], order
        else:
            source = self._place(part.source)
        self._emit(Normalise(part, source, self._new(part.name, source.width), self._of_whole(part.name, order)))

    def _of_whole(self, name: str, order: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """Returns columns of the rank's part of a value as columns of the whole value; None for all in their order."""
        own = self._own.columns.get(name)
        return order if own is None else own if order is None else tuple(own[at] for at in order)

    def _linear(self, at: int, part: Linear) -> None:
        source = self._place(part.source)
        gated = self._gated_by(part)
        if gated is not None:
            weights, use = gated
            to = self._new(key(use), self._width_of_rows(weights[0]))
            biased = self._biased(self._linears({rows.name for rows in weights}))
            weights = tuple(Rows(rows.name, self._of_whole(rows.name, rows.rows)) for rows in weights)
            self._emit(Multiply(weights, biased, source, to, use.activation, gated=use.up is not None))
            self._done |= {rows.name for rows in weights}
            return
        factor, inputs = self._only_added(part.name, at), self._own.inputs.get(part.name)
        if factor is not None:
            rows = (Rows(part.name),)
            self._emit(Multiply(rows, self._biased([part]), source, self._places[INPUT], add=factor, inputs=inputs))
            self._held[part.name] = factor
            return
        siblings = [part, *self._siblings(at, part)]
        buffer = self._buffer(sum(self._width[sibling.name] for sibling in siblings))
        first = 0
        picked: list[Rows] = []
        for sibling in siblings:
            self._places[sibling.name] = Place(buffer, first, self._width[sibling.name])
            order = self._wanted_order(sibling)
            if order is not None:
                self._order[sibling.name] = order
            picked.append(Rows(sibling.name, self._of_whole(sibling.name, order)))
            first += self._width[sibling.name]
            self._done.add(sibling.name)
        self._emit(Multiply(tuple(picked), self._biased(siblings), source, Place(buffer, 0, first), inputs=inputs))

    def _siblings(self, at: int, part: Linear) -> Iterator[Linear]:
        """Later linears over the same input that write nothing but their outputs."""
        for later, other in enumerate(self._layer.parts[at + 1 :], at + 1):
            if not isinstance(other, Linear) or other.source != part.source or other.name in self._done:
                continue
            if self._own.inputs.get(other.name) != self._own.inputs.get(part.name):
                continue
            if self._gated_by(other) is None and self._only_added(other.name, later) is None:
                yield other

    def _linears(self, called: set[str]) -> list[Linear]:
        return [part for part in self._layer.parts if isinstance(part, Linear) and part.name in called]

    @staticmethod
    def _biased(linears: Iterable[Linear]) -> frozenset[str]:
        return frozenset(part.name for part in linears if part.bias)

    def _width_of_rows(self, rows: Rows) -> int:
        return self._width[rows.name] if rows.rows is None else len(rows.rows)

    def _gated_by(self, part: Linear) -> tuple[tuple[Rows, ...], Gated] | None:
        """Returns the rows of linears that only an activation reads, `part` among them, and that expression."""
        if part.name in self._own.inputs:
            return None
        for use in (source for _, source in self._reads):
            if not isinstance(use, Gated) or use.repeats != 1 or use.factor != 1.0 or part.name not in names(use):
                continue
            if not all(reader == use for _, reader in self._reads if names(reader) & names(use)):
                continue
            made_of = self._linears(names(use))
            if {other.name for other in made_of} != names(use) or any(o.source != part.source for o in made_of):
                continue
            rows = [self._rows(source) for source in (use.gate, use.up) if source is not None]
            if None not in rows and len({self._width_of_rows(r) for r in rows if r is not None}) == 1:
                return tuple(r for r in rows if r is not None), use
        return None

    def _rows(self, source: Source) -> Rows | None:
        """Returns the rows of one linear that give an expression, if there is no more to it."""
        name = self._whole(source)
        if name is not None:
            return Rows(name)
        if not isinstance(source, Columns) or source.clip is not None or len(names(source)) != 1:
            return None
        return Rows(next(iter(names(source))), tuple(column for _, column in columns(source)))

    def _attention(self, part: Attention) -> None:
        rotary, order = halves(part.rotary, part.head_dim)
        query = self._heads(part.query, part.heads, order)
        if part.name in self._latents and rotary is not None:
            self._latent_attention(part, rotary, query, self._latents[part.name])
            return
        key = self._heads(part.key, part.kv_heads, order)
        value = self._heads(part.value, part.kv_heads, None)
        to = self._new(part.name, part.heads * part.value_dim)
        self._emit(Attend(part, rotary, query, key, value, to, self._own.heads[0] if self._own.heads else 0))

    def _latent_attention(self, part: Attention, rotary: Rotary, query: Place, latent: Latent) -> None:
        """Attends over [rotated part, latent], as one KV head. In `query`, the rotated columns of a head are first."""
        source = self._place(latent.linear.source)
        turned, size = rotary.width, rotary.width + source.width
        nope = part.head_dim - turned

        def to(width: int) -> Place:
            return Place(self._buffer(width), 0, width)

        queries, key, sums = to(part.heads * size), to(size), to(part.heads * source.width)
        heads = range(part.heads)
        of_query = [Place(query.buffer, query.first + at * part.head_dim, turned) for at in heads]
        self._emit(Gather(tuple((place, at * size) for place, at in zip(of_query, heads, strict=True)), queries))
        name = latent.linear.name
        keys, values = (
            tuple(self._of_whole(name, rows) or rows for rows in some) for some in (latent.key_rows, latent.value_rows)
        )
        first = Place(query.buffer, query.first + turned, nope)
        absorbed = Place(queries.buffer, turned, source.width)
        self._emit(MultiplyHeads(name, keys, True, first, part.head_dim, absorbed, size))
        assert part.rotary is not None
        _, order = halves(replace(part.rotary, first=0), turned)
        shared = [latent.shared[at] for at in order] if order is not None else list(latent.shared)
        place = self._gather(shared, None)
        self._emit(Gather(((place, 0), (source, turned)), key))
        own = replace(part, kv_heads=1, head_dim=size, value_dim=source.width)
        first_head = self._own.heads[0] if self._own.heads else 0
        value = Place(key.buffer, turned, source.width)
        self._emit(Attend(own, rotary, queries, key, value, sums, first_head, in_key=True))
        of_head = Place(sums.buffer, 0, source.width)
        attended = self._new(part.name, part.heads * part.value_dim)
        first = Place(attended.buffer, 0, part.value_dim)
        self._emit(MultiplyHeads(name, values, False, of_head, source.width, first, part.value_dim))

    def _heads(self, source: Source, heads: int, order: tuple[int, ...] | None) -> Place:
        """Returns where the source is, with the columns of each head in this order."""
        name = self._whole(source)
        if name is not None and self._order.get(name) == of_heads(order, heads):
            return self._places[name]
        if not isinstance(source, Columns):
            if order is not None:
                raise NoKernel("rotated heads that are more than columns of a value")
            return self._place(source)
        picked = list(columns(source))
        wanted = of_heads(order, heads)
        if wanted is not None:
            picked = [picked[at] for at in wanted]
        return self._gather(picked, source.clip)

    def _wanted_order(self, part: Linear) -> tuple[int, ...] | None:
        """Returns the order of a linear's outputs in which attention can read them without a copy."""
        made = {part.name}
        for other in self._layer.parts:
            if isinstance(other, Norm) and self._whole(other.source) in made:
                made.add(other.name)
            elif isinstance(other, Attention):
                _, order = halves(other.rotary, other.head_dim)
                for source, heads in ((other.query, other.heads), (other.key, other.kv_heads)):
                    if self._whole(source) in made and self._readers(made) == 1:
                        return of_heads(order, heads)
        return None

    def _readers(self, values: set[str]) -> int:
        """Number of expressions of other parts that read one of these values."""
        return sum(bool(names(source) & values) for owner, source in self._reads if owner not in values)

    def _mix(self, part: Experts) -> None:
        source = self._place(part.source)
        logits = self._places.get(part.router.logits)
        to = self._new(part.name, self._hidden)
        self._emit(
            Mix(part, source, logits, to, self._own.widths.get(part.name, part.width), self._own.inputs.get(part.name))
        )

    def _only_added(self, name: str, at: int) -> float | None:
        """Returns the factor of a value that can be added to buffer 0 right now, and is read nowhere else."""
        factors = set()
        for _, source in self._reads:
            if name in names(source):
                if not isinstance(source, Sum | Blend):
                    return None
                factors.add(terms(source).get(name))
        if len(factors) != 1 or None in factors:
            return None
        for source in self._later_sources(at):
            if INPUT in names(source) and name not in names(source):
                return None  # Something still wants the sum without it.
        return factors.pop()

    def _place(self, source: Source) -> Place:
        """Returns where an expression's value is. Computes it if it is nowhere."""
        name = self._whole(source)
        if name is not None and name not in self._order:
            return self._places[name]
        if key(source) in self._places:
            return self._places[key(source)]
        if isinstance(source, Sum):
            return self._sum(source)
        if isinstance(source, Columns):
            return self._gather(list(columns(source)), source.clip)
        if isinstance(source, Gated):
            return self._gate(source)
        raise NoKernel("a sum of gated values inside a layer")

    def _sum(self, source: Sum) -> Place:
        """Adds to buffer 0 if nothing later wants it without. Otherwise the sum gets a buffer of its own."""
        summed = dict(source.terms)
        if all(summed.get(name) == factor for name, factor in self._held.items()):
            more = {name: factor for name, factor in summed.items() if name not in self._held}
            if not more:
                return self._places[INPUT]
            if not any(INPUT in names(later) and not set(more) <= names(later) for later in self._unread(source)):
                self._add(more)
                return self._places[INPUT]
        if any(name in self._held and name != INPUT for name in summed):
            raise NoKernel("a sum of what is already added")
        terms = tuple((self._places[name], factor) for name, factor in source.terms)
        to = self._new(key(source), terms[0][0].width)
        self._emit(Combine(terms, to, keeps=False))
        return to

    def _add(self, summed: dict[str, float]) -> None:
        """Adds values to buffer 0."""
        x = self._places[INPUT]
        self._emit(Combine(tuple((self._places[name], factor) for name, factor in summed.items()), x, keeps=True))
        self._held |= summed

    def _unread(self, source: Source) -> Iterable[Source]:
        """Expressions that are read after this one."""
        sources = [other for _, other in self._reads]
        return sources[sources.index(source) + 1 :]

    def _finish(self) -> None:
        output = self._layer.output
        if isinstance(output, Columns) and self._whole(output) is not None:
            output = Sum(((output.runs[0][0], 1.0),))
        parts = output.parts if isinstance(output, Blend) else (output,)
        added = terms(output)
        if any(added.get(name) != factor for name, factor in self._held.items()):
            if set(self._held) != {INPUT}:
                raise NoKernel("an output that is not what was added up")
            places = tuple((self._places[name], factor) for name, factor in added.items())
            self._emit(Combine(places, self._places[INPUT], keeps=False))
        else:
            more = {name: factor for name, factor in added.items() if name not in self._held}
            if more:
                self._add(more)
        for part in parts:
            if isinstance(part, Gated):
                gate, up = self._place(part.gate), self._place(part.up) if part.up is not None else None
                to = self._places[INPUT]
                self._emit(Gate(part.activation, gate, up, part.repeats, part.factor, to, add=True))
            elif not isinstance(part, Sum):
                raise NoKernel("an output of an unknown form")

    def _gate(self, source: Gated) -> Place:
        gate = self._place(source.gate)
        up = self._place(source.up) if source.up is not None else None
        to = self._new(key(source), up.width if up is not None else gate.width)
        self._emit(Gate(source.activation, gate, up, source.repeats, source.factor, to))
        return to

    def _gather(self, picked: list[tuple[str, int]], clip: float | None) -> Place:
        runs: list[tuple[Place, int]] = []
        ordered = {name for name, _ in picked} & self._order.keys()
        at_of = {name: {column: at for at, column in enumerate(self._order[name])} for name in ordered}
        for at, (name, column) in enumerate(picked):
            place = self._places[name]
            first = place.first + (at_of[name][column] if name in self._order else column)
            last = runs[-1] if runs else None
            if last is not None and last[0].buffer == place.buffer and last[0].first + last[0].width == first:
                runs[-1] = replace(last[0], width=last[0].width + 1), last[1]
            else:
                runs.append((Place(place.buffer, first, 1), at))
        if len(runs) == 1 and clip is None:
            return runs[0][0]
        to = Place(self._buffer(len(picked)), 0, len(picked))
        self._emit(Gather(tuple(runs), to, clip))
        return to

    def _whole(self, source: Source | None) -> str | None:
        return whole(source, self._width)

    def _later_sources(self, at: int) -> list[Source]:
        later = {part.name for part in self._layer.parts[at + 1 :]} | {""}
        return [source for owner, source in self._reads if owner in later]

    def _new(self, name: str, width: int) -> Place:
        place = self._places[name] = Place(self._buffer(width), 0, width)
        return place

    def _buffer(self, width: int) -> int:
        self._program.widths.append(width)
        return len(self._program.widths) - 1

    def _emit(self, operation: Operation) -> None:
        self._program.operations.append(operation)
