"""Makes the kernels' structures of a layer's program and its weights."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kv.memory import zeros
from ..model.cut import Range
from ..model.parts.description import Norm, Rotary
from . import ops, structures
from .packing import BLOCK, Packing, alike
from .program.operations import (
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
from .weights import Matrix, Parameters, turned


@dataclass
class Assembled:
    """The operations of one layer in memory, and what they point to."""

    operations: ctypes.Array[structures.Operation]
    tensors: list[Tensor]
    terms: list[Any]

    def again(self) -> Assembled:
        """Returns the same operations for another shard, which sets its own pages."""
        return replace(self, operations=type(self.operations).from_buffer_copy(self.operations))

    def set_pages(self, keys: int, values: int) -> None:
        """Sets the addresses of the layer's pages."""
        for operation in self.operations:
            operation.attention.k_pages, operation.attention.v_pages = keys, values


def assemble(
    program: Program,
    parameters: Parameters,
    prefix: str,
    dtype: torch.dtype,
    rotaries: Sequence[Rotary] = (),
    is_first_rank: bool = True,
) -> Assembled:
    """Reads and packs the weights, one after the other. Names within the layer follow `prefix`.

    `rotaries`: those of the stage's `Shape`. `is_first_rank`: whether this rank adds the biases of sums over ranks.

    Raises:
        NoKernel: an operation has no kernel.
        CheckpointError: a tensor cannot be read.
    """
    made = _Assembler(parameters, prefix, dtype, rotaries, is_first_rank)
    operations = [part for operation in program.operations for part in made.operations(operation)]
    return Assembled((structures.Operation * len(operations))(*operations), made.tensors, made.terms)


class _Assembler:
    def __init__(
        self,
        parameters: Parameters,
        prefix: str,
        dtype: torch.dtype,
        rotaries: Sequence[Rotary],
        is_first_rank: bool,
    ) -> None:
        self.tensors: list[Tensor] = []
        self.terms: list[Any] = []
        self._parameters, self._prefix, self._dtype, self._rotaries = parameters, prefix, dtype, rotaries
        self._is_first_rank = is_first_rank

    def operations(self, operation: Operation) -> Iterator[structures.Operation]:
        if isinstance(operation, Multiply):
            yield from self._multiply(operation)
        else:
            yield self._operation(operation)

    def _operation(self, operation: Operation) -> structures.Operation:
        if isinstance(operation, Normalise):
            return self._normalise(operation)
        if isinstance(operation, Gather | Combine):
            return self._terms(operation)
        if isinstance(operation, Gate):
            return self._made(
                operation,
                activation=_number(operation.activation),
                source=_place(operation.gate),
                other=_place(operation.up),
                width=operation.repeats,
                factor=operation.factor,
                adds=operation.add,
            )
        if isinstance(operation, Attend):
            return self._attend(operation)
        if isinstance(operation, MultiplyHeads):
            return self._multiply_heads(operation)
        assert isinstance(operation, Mix)
        return self._mix(operation)

    @staticmethod
    def _made(operation: Operation, **fields: Any) -> structures.Operation:
        kind = structures.KINDS[type(operation).__name__]
        return structures.Operation(kind=kind, to=_place(operation.to), **fields)

    def _normalise(self, operation: Normalise) -> structures.Operation:
        part, order = operation.part, operation.order

        def row(name: str | None, offset: float) -> Tensor | None:
            if name is None:
                return None
            found = self._vector(name).flatten() + offset
            if order is None:
                return found
            return found[[at % part.width for at in order] if found.numel() == part.width else list(order)]

        weight, bias = row(part.weight, part.weight_offset), row(part.bias, 0.0)
        if weight is not None and bias is not None and len(weight) != len(bias):
            weight, bias = (
                x if len(x) > part.width else x.repeat(operation.to.width // part.width) for x in (weight, bias)
            )
        return self._made(
            operation,
            source=_place(operation.source),
            width=part.width,
            blocks=any(x is not None and len(x) != part.width for x in (weight, bias)),
            centred=part.centred,
            rounds=part.rounds,
            eps=part.eps,
            weight=self._keep(weight),
            bias=self._keep(bias),
        )

    def _multiply(self, operation: Multiply) -> Iterator[structures.Operation]:
        """One linear; or one for each weight, if they are not quantized alike."""
        matrices = [self._matrix(rows, operation.inputs) for rows in operation.weights]
        if not operation.gated and not alike(matrices):
            first = operation.to.first
            for rows, matrix in zip(operation.weights, matrices, strict=True):
                to = replace(operation.to, first=first, width=matrix.shape[0])
                first += matrix.shape[0]
                yield self._multiplied(replace(operation, weights=(rows,), to=to), [matrix])
            return
        yield self._multiplied(operation, matrices)

    def _multiplied(self, operation: Multiply, matrices: Sequence[Matrix]) -> structures.Operation:
        return self._made(
            operation,
            source=_place(operation.source),
            activation=_number(operation.activation),
            gated=operation.gated,
            adds=operation.add is not None,
            sums=operation.inputs is not None,
            factor=1.0 if operation.add is None else operation.add,
            linear=self._packed(matrices, self._biases(operation, matrices), operation.gated),
        )

    def _multiply_heads(self, operation: MultiplyHeads) -> structures.Operation:
        def of_head(rows: tuple[int, ...]) -> list[Matrix]:
            # Quantized ones are dequantized: their groups are along the other dimension.
            matrix = replace(self._parameters.matrix(f"{self._prefix}{operation.name}.weight", rows), packed=None)
            return [turned(matrix, self._dtype) if operation.transposed else matrix]

        linear, step = self._stack(map(of_head, operation.rows), len(operation.rows), gated=False)
        return self._made(
            operation,
            source=_place(operation.source),
            linear=linear,
            heads=len(operation.rows),
            source_step=operation.source_step,
            to_step=operation.to_step,
            head_bytes=step,
        )

    def _stack(self, every: Iterable[Sequence[Matrix]], count: int, gated: bool) -> tuple[structures.Linear, int]:
        """Packs linears of one shape, one after the other. Returns the first, and the bytes from one to the next."""
        linear, out, step = structures.Linear(), torch.empty(0), 0
        for at, parts in enumerate(every):
            packing = Packing(parts, self._dtype, gated=gated)
            if not at:
                linear, step = packing.linear, packing.memory().nbytes
                out = zeros((count * step,), torch.uint8)
                linear.weights = self._keep(out)
            elif (packing.linear.codes, packing.linear.group) != (linear.codes, linear.group):
                raise NoKernel("experts that are quantized in different ways")
            packing.write(out[at * step : (at + 1) * step], self._parameters.scratch)
        return linear, step

    def _matrix(self, rows: Rows, columns: Range | None) -> Matrix:
        return self._parameters.matrix(f"{self._prefix}{rows.name}.weight", rows.rows, columns)

    def _biases(self, operation: Multiply, matrices: Sequence[Matrix]) -> list[Tensor] | None:
        if not operation.biased or (operation.inputs is not None and not self._is_first_rank):
            return None
        biases = []
        for rows, matrix in zip(operation.weights, matrices, strict=True):
            if rows.name not in operation.biased:
                biases.append(torch.zeros(matrix.shape[0]))
                continue
            bias = self._vector(f"{rows.name}.bias")
            biases.append(bias if rows.rows is None else bias[list(rows.rows)])
        return biases

    def _packed(self, matrices: Sequence[Matrix], biases: list[Tensor] | None, gated: bool) -> structures.Linear:
        linear, _ = self._stack([matrices], 1, gated)
        if biases is not None:
            linear.bias = self._keep(self._bias(biases, gated, _padded(linear.n)))
        return linear

    @staticmethod
    def _bias(biases: Sequence[Tensor], gated: bool, padded: int) -> Tensor:
        joined = interleave(*(bias[:, None] for bias in biases))[:, 0] if gated else torch.cat(list(biases))
        return torch.nn.functional.pad(joined, (0, padded - len(joined)))

    def _terms(self, operation: Gather | Combine) -> structures.Operation:
        if isinstance(operation, Gather):
            terms = [structures.Term(_place(place), 1.0, first) for place, first in operation.runs]
        else:
            scale = float(self._vector(operation.scale)) if operation.scale is not None else 1.0
            terms = [structures.Term(_place(place), scale * factor, 0) for place, factor in operation.terms]
        array = (structures.Term * len(terms))(*terms)
        self.terms.append(array)
        clip = operation.clip if isinstance(operation, Gather) else None
        return self._made(
            operation,
            terms=ctypes.addressof(array),
            term_count=len(terms),
            adds=isinstance(operation, Combine) and operation.keeps,
            clip=0.0 if clip is None else clip,
        )

    def _attend(self, operation: Attend) -> structures.Operation:
        part = operation.part
        if part.head_dim % 2:
            raise NoKernel(f"heads of {part.head_dim}, which is odd")
        first = operation.first_head
        sinks = self._vector(part.sinks)[first : first + part.heads] if part.sinks is not None else None
        attention = structures.Attention(
            query=_place(operation.query),
            key=_place(operation.key),
            value=_place(operation.value),
            heads=part.heads,
            kv_heads=part.kv_heads,
            dim=part.head_dim,
            value_dim=part.value_dim,
            window=part.window or 0,
            rotary=-1 if operation.rotary is None else list(self._rotaries).index(operation.rotary),
            value_in_key=operation.value.first - operation.key.first if operation.in_key else -1,
            scale=part.scale,
            softcap=part.softcap or 0.0,
            sinks=self._keep(sinks),
        )
        return self._made(operation, attention=attention)

    def _mix(self, operation: Mix) -> structures.Operation:
        part, router = operation.part, operation.part.router
        width = operation.inputs or (0, part.width)
        if part.interleaved:
            gate, up = range(2 * width[0], 2 * width[1], 2), range(2 * width[0] + 1, 2 * width[1] + 1, 2)
        else:
            gate, up = (range(first + width[0], first + width[1]) for first in (0, operation.whole_width))

        def small(name: str | None) -> int | None:
            return None if name is None else self._keep(self._vector(name).flatten())

        def stack(name: str, rows: Sequence[range], columns: Range | None) -> tuple[structures.Linear, int]:
            parameter, gated = f"{self._prefix}{part.name}.{name}_proj", len(rows) > 1
            every = [row for some in rows for row in some]
            counts = [len(some) for some in rows]
            experts = (
                _split(self._parameters.expert(parameter, expert, every, columns, part.transposed), counts)
                for expert in range(part.count)
            )
            linear, step = self._stack(experts, part.count, gated)
            if part.bias:
                whole = self._vector(f"{part.name}.{name}_proj_bias")
                if columns is not None and not self._is_first_rank:
                    whole = torch.zeros_like(whole)
                biases = [self._bias([b[list(some)] for some in rows], gated, _padded(linear.n)) for b in whole]
                linear.bias = self._keep(torch.cat(biases))
            return linear, step

        gate_up, gate_up_bytes = stack("gate_up", [gate, up], None)
        down, down_bytes = stack("down", [range(operation.to.width)], operation.inputs)
        logits = structures.Linear()
        if operation.logits is None:
            logits = self._packed([self._matrix_of(router.logits)], None, gated=False)
        chooser = structures.Router(
            logits=logits,
            experts=part.count,
            used=router.used,
            scores=structures.SCORES.index(router.scores),
            groups=router.groups,
            groups_used=router.groups_used,
            group_top=router.group_top,
            chosen_by_logits=router.chosen_by_logits,
            softmax_of_chosen=router.softmax_of_chosen,
            normalise=router.normalise,
            factor=router.factor,
            bias=small(router.bias),
            choice_bias=small(router.choice_bias),
        )
        limited = part.activation == "swiglu_oss"
        return self._made(
            operation,
            source=_place(operation.source),
            other=_place(operation.logits),
            activation=0 if limited else _number(part.activation),
            sums=operation.inputs is not None,
            mixture=structures.Mixture(chooser, gate_up, down, width[1] - width[0], limited, gate_up_bytes, down_bytes),
        )

    def _vector(self, name: str) -> Tensor:
        return self._parameters.vector(self._prefix + name)

    def _matrix_of(self, name: str) -> Matrix:
        return self._parameters.matrix(self._prefix + name)

    def _keep(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self.tensors.append(tensor)
        return tensor.data_ptr()


def final_norm(part: Norm, hidden: int, parameters: Parameters, prefix: str, dtype: torch.dtype) -> Assembled:
    """Reads the norm before the head, as one operation. Its parameters are called PREFIX.NAME."""
    place = Place(HIDDEN, 0, hidden)
    return assemble(Program([Normalise(part, place, place)], [hidden]), parameters, f"{prefix}.", dtype)


def rotaries_of(programs: Sequence[Program]) -> list[Rotary]:
    """Returns the different rotary embeddings of all layers."""
    found: list[Rotary] = []
    for program in programs:
        for operation in program.operations:
            if isinstance(operation, Attend) and operation.rotary is not None and operation.rotary not in found:
                found.append(operation.rotary)
    return found


def interleave(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Returns [2 I, H]: blocks of `BLOCK` rows of gate and up in turn. The last blocks are filled with zeros."""
    if up is None:
        return gate
    padding = (0, 0, 0, -len(gate) % BLOCK)
    blocks = [torch.nn.functional.pad(weight, padding).view(-1, BLOCK, weight.shape[1]) for weight in (gate, up)]
    return torch.stack(blocks, 1).flatten(0, 2)


def _split(whole: Matrix, counts: Sequence[int]) -> list[Matrix]:
    """Splits the rows of a matrix."""
    parts, first = list[Matrix](), 0
    for count in counts:
        packed = whole.packed.rows(first, first + count) if whole.packed is not None else None
        parts.append(Matrix((count, whole.shape[1]), partial(_fill_from, whole, first), packed))
        first += count
    return parts


def _fill_from(whole: Matrix, first: int, out: Tensor, start: int) -> None:
    whole.fill(out, first + start)


def _padded(n: int) -> int:
    return -(-n // ops.PANEL) * ops.PANEL


def _place(place: Place | None) -> structures.Place:
    return structures.Place() if place is None else structures.Place(place.buffer, place.first, place.width)


def _number(activation: str | None) -> int:
    if activation is None:
        return 0
    if activation not in structures.ACTIVATIONS:
        raise NoKernel(f"the activation {activation}")
    return structures.ACTIVATIONS.index(activation)
