"""Computes a layer from its kernel operations, as plainly as possible: the reference of the compiled kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from parts_reference import attend, mix, rotate
from torch import Tensor

from stagemesh.stage_worker.model.parts.reading.explain import ACTIVATIONS
from stagemesh.stage_worker.model.parts.reading.norms import normalise
from stagemesh.stage_worker.native.program.operations import (
    HIDDEN,
    Attend,
    Combine,
    Gate,
    Gather,
    Mix,
    Multiply,
    MultiplyHeads,
    Normalise,
    Place,
    Program,
    Rows,
)

Parameters = Mapping[str, Tensor]


def run_program(program: Program, x: Tensor, parameters: Parameters) -> Tensor:
    """Hidden states [T, H] after one layer."""
    buffers = [torch.full((len(x), width), torch.nan, dtype=x.dtype) for width in program.widths]
    buffers[HIDDEN].copy_(x)

    def at(place: Place) -> Tensor:
        return buffers[place.buffer][:, place.first : place.first + place.width]

    for operation in program.operations:
        if isinstance(operation, Normalise):
            at(operation.to).copy_(_normalised(operation, at(operation.source), parameters))
        elif isinstance(operation, Multiply):
            _multiply(operation, at(operation.source), at(operation.to), parameters)
        elif isinstance(operation, Gather):
            for source, first in operation.runs:
                at(operation.to)[:, first : first + source.width] = at(source)
            if operation.clip is not None:
                at(operation.to).clamp_(-operation.clip, operation.clip)
        elif isinstance(operation, Combine):
            total = sum(factor * at(place) for place, factor in operation.terms)
            if operation.scale is not None:
                total = total * parameters[operation.scale]
            at(operation.to).copy_(at(operation.to) + total if operation.keeps else total)
        elif isinstance(operation, Gate):
            gate = operation.factor * ACTIVATIONS[operation.activation](at(operation.gate))
            out = gate.repeat_interleave(operation.repeats, dim=1)
            if operation.up is not None:
                out = out * at(operation.up)
            at(operation.to).copy_(at(operation.to) + out if operation.add else out)
        elif isinstance(operation, Attend):
            part = operation.part
            query = at(operation.query).reshape(len(x), part.heads, -1)
            key = at(operation.key).reshape(len(x), part.kv_heads, -1)
            value = at(operation.value).reshape(len(x), part.kv_heads, -1)
            if operation.rotary is not None:
                query, key = rotate(query, operation.rotary), rotate(key, operation.rotary)
            at(operation.to).copy_(attend(part, query, key, value, parameters))
        elif isinstance(operation, MultiplyHeads):
            _multiply_heads(operation, buffers, parameters[f"{operation.name}.weight"])
        elif isinstance(operation, Mix):
            logits = at(operation.logits) if operation.logits is not None else None
            at(operation.to).copy_(mix(operation.part, at(operation.source), logits, parameters))
    return buffers[HIDDEN]


def _normalised(operation: Normalise, x: Tensor, parameters: Parameters) -> Tensor:
    part = operation.part
    blocks = normalise(x.unflatten(1, (-1, part.width)), part.centred, part.eps)

    def ordered(name: str) -> Tensor:
        whole = parameters[name].expand(blocks.shape[1:]).flatten()
        return (whole if operation.order is None else whole[list(operation.order)]).view(blocks.shape[1:])

    if part.weight is not None:
        blocks = blocks * (ordered(part.weight) + part.weight_offset)
    if part.bias is not None:
        blocks = blocks + ordered(part.bias)
    return blocks.flatten(1)


def _multiply(operation: Multiply, x: Tensor, to: Tensor, parameters: Parameters) -> None:
    def product(rows: Rows) -> Tensor:
        weight = parameters[f"{rows.name}.weight"]
        bias = parameters.get(f"{rows.name}.bias", torch.zeros(len(weight), dtype=x.dtype))
        picked = list(rows.rows) if rows.rows is not None else slice(None)
        return x @ weight[picked].T + bias[picked]

    outputs = [product(rows) for rows in operation.weights]
    if operation.activation is not None:
        outputs[0] = ACTIVATIONS[operation.activation](outputs[0])
    out = outputs[0] * outputs[1] if operation.gated else torch.cat(outputs, dim=1)
    to.copy_(out if operation.add is None else to + operation.add * out)


def _multiply_heads(operation: MultiplyHeads, buffers: list[Tensor], weight: Tensor) -> None:
    source, to = operation.source, operation.to
    for head, rows in enumerate(operation.rows):
        first = source.first + head * operation.source_step
        own = weight[list(rows)].T if operation.transposed else weight[list(rows)]
        out = buffers[source.buffer][:, first : first + source.width] @ own.T
        first = to.first + head * operation.to_step
        buffers[to.buffer][:, first : first + to.width] = out
