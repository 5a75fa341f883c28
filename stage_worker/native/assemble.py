"""Makes the kernels' structures of a layer's program and its weights."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..model.cut import Range
from ..model.parts.description import Norm, Rotary
from . import ops, structures
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
from .weights import BLOCK, Matrix, Parameters, outputs, turned


class Assembled:
    """The operations of one layer in memory, and the tensors to which they point."""

    def __init__(
        self,
        program: Program,
        parameters: Parameters,
        prefix: str,
        dtype: torch.dtype,
        rotaries: Sequence[Rotary],
        is_first_rank: bool,
    ) -> None:
        """Reads and packs the weights, one after the other. Names within the layer follow `prefix`.

        `rotaries`: those of the stage's `Shape`. `is_first_rank`: whether this rank adds the biases of sums over ranks.

        Raises:
            NoKernel: an operation has no kernel.
            CheckpointError: a tensor cannot be read.
        """
        self.tensors: list[Tensor] = []
        self._parameters, self._prefix, self._dtype, self._rotaries = parameters, prefix, dtype, rotaries
        self._is_first_rank = is_first_rank
        self._kept: list[Any] = []
        made = [self._operation(operation) for operation in program.operations]
        self.operations = (structures.Operation * len(made))(*made)

    def again(self) -> Assembled:
        """Returns the same operations for another shard, which sets its own pages."""
        other = object.__new__(Assembled)
        vars(other).update(vars(self))
        other.operations = type(self.operations).from_buffer_copy(self.operations)
        return other

    def set_pages(self, keys: int, values: int) -> None:
        """Sets the addresses of the layer's pages."""
        for operation in self.operations:
            operation.attention.k_pages, operation.attention.v_pages = keys, values

    def _operation(self, operation: Operation) -> structures.Operation:
        if isinstance(operation, Normalise):
            return self._normalise(operation)
        if isinstance(operation, Multiply):
            return self._multiply(operation)
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

    def _multiply(self, operation: Multiply) -> structures.Operation:
        matrices = [self._matrix(rows, operation.inputs) for rows in operation.weights]
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
        n, k = operation.to.width, operation.source.width
        self._check_inputs(k)
        size = -(-n // ops.PANEL) * ops.PANEL
        packed = ops.panels(len(operation.rows) * size, k, self._dtype)
        for head, rows in enumerate(operation.rows):
            matrix = self._parameters.matrix(f"{self._prefix}{operation.name}.weight", rows)
            if operation.transposed:
                matrix = turned(matrix, self._dtype)
            self._parameters.pack([matrix], packed[head * size :])
        return self._made(
            operation,
            source=_place(operation.source),
            linear=structures.Linear(self._keep(packed), None, n, k),
            heads=len(operation.rows),
            source_step=operation.source_step,
            to_step=operation.to_step,
            head_bytes=size * k * self._dtype.itemsize,
        )

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
        n, k = outputs(matrices, gated), matrices[0].shape[1]
        self._check_inputs(k)
        packed = ops.panels(n, k, self._dtype)
        self._parameters.pack(matrices, packed, gated=gated)
        bias = self._bias(biases, gated, len(packed)) if biases is not None else None
        return structures.Linear(self._keep(packed), self._keep(bias), n, k)

    def _check_inputs(self, k: int) -> None:
        if k % 2 and self._dtype != torch.float32:
            raise NoKernel(f"a linear over {k} columns, which is odd")

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
        self._kept.append(array)
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
        self._check_inputs(width[1] - width[0])

        def small(name: str | None) -> int | None:
            return None if name is None else self._keep(self._vector(name).flatten())

        def stack(name: str, rows: Sequence[range], columns: Range | None) -> tuple[structures.Linear, int]:
            gated = len(rows) > 1
            parameter = f"{self._prefix}{part.name}.{name}_proj"
            packed, biases = torch.empty(0), []
            n = k = 0
            for expert in range(part.count):
                every = [row for some in rows for row in some]
                whole = self._parameters.expert(parameter, expert, every, columns, part.transposed)
                parts = _split(whole, [len(some) for some in rows])
                if not expert:
                    n, k = outputs(parts, gated), whole.shape[1]
                    packed = ops.panels(part.count * padded(n), k, self._dtype)
                self._parameters.pack(parts, packed[expert * padded(n) :], gated=gated)
            if part.bias:
                whole_bias = self._vector(f"{part.name}.{name}_proj_bias")
                if columns is not None and not self._is_first_rank:
                    whole_bias = torch.zeros_like(whole_bias)
                biases = [self._bias([b[list(some)] for some in rows], gated, padded(n)) for b in whole_bias]
            bias = self._keep(torch.cat(biases)) if biases else None
            return structures.Linear(self._keep(packed), bias, n, k), padded(n) * k * self._dtype.itemsize

        def padded(n: int) -> int:
            return -(-n // ops.PANEL) * ops.PANEL

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
    return Assembled(Program([Normalise(part, place, place)], [hidden]), parameters, f"{prefix}.", dtype, (), True)


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
        parts.append(Matrix((count, whole.shape[1]), partial(_fill_from, whole, first)))
        first += count
    return parts


def _fill_from(whole: Matrix, first: int, out: Tensor, start: int) -> None:
    whole.fill(out, first + start)


def _place(place: Place | None) -> structures.Place:
    return structures.Place() if place is None else structures.Place(place.buffer, place.first, place.width)


def _number(activation: str | None) -> int:
    if activation is None:
        return 0
    if activation not in structures.ACTIVATIONS:
        raise NoKernel(f"the activation {activation}")
    return structures.ACTIVATIONS.index(activation)
