"""Computes a whole decoder from its description, as plainly as possible: the reference of the compiled kernels.

Shapes: T tokens, N heads, K KV heads, D head size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stagemesh.stage_worker.model.parts.description import (
    INPUT,
    Attention,
    Experts,
    LayerParts,
    Linear,
    ModelParts,
    Norm,
    Rotary,
    Source,
)
from stagemesh.stage_worker.model.parts.reading.experts import swiglu_oss
from stagemesh.stage_worker.model.parts.reading.explain import ACTIVATIONS, evaluate
from stagemesh.stage_worker.model.parts.reading.norms import normalise
from stagemesh.stage_worker.model.parts.reading.router import route

Parameters = Mapping[str, Tensor]


def logits(model: ModelParts, embedded: Tensor, layers: list[Parameters], norm: Parameters, head: Parameters) -> Tensor:
    """Logits [T, V] of the tokens of one sequence, from their embeddings [T, H]."""
    x = embedded * model.embedding_scale
    for parameters, kind in zip(layers, model.kinds, strict=True):
        x = run_layer(model.layers[kind], x, parameters)
    x = _norm(model.final_norm, {INPUT: x}, norm)
    out = (x @ head["weight"].T + head.get("bias", torch.zeros(1))) * model.logits_scale
    cap = model.logits_softcap
    return out if cap is None else cap * torch.tanh(out / cap)


def run_layer(layer: LayerParts, x: Tensor, parameters: Parameters) -> Tensor:
    """Hidden states [T, H] after one layer."""
    values = {INPUT: x}
    for part in layer.parts:
        if isinstance(part, Norm):
            values[part.name] = _norm(part, values, parameters)
        elif isinstance(part, Linear):
            out = evaluate(part.source, values) @ parameters[f"{part.name}.weight"].T
            values[part.name] = out + parameters[f"{part.name}.bias"] if part.bias else out
        elif isinstance(part, Attention):
            values[part.name] = _attend(part, values, parameters)
        else:
            given = values.get(part.router.logits)
            values[part.name] = mix(part, evaluate(part.source, values), given, parameters)
    out = evaluate(layer.output, values)
    return out if layer.scale is None else out * parameters[layer.scale]


def _norm(part: Norm, values: Parameters, parameters: Parameters) -> Tensor:
    x = evaluate(part.source, values)
    blocks = normalise(x.unflatten(1, (-1, part.width)), part.centred, part.eps)
    if part.weight is not None:
        blocks = blocks * (parameters[part.weight] + part.weight_offset)
    if part.bias is not None:
        blocks = blocks + parameters[part.bias]
    return blocks.flatten(1)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotates [T, heads, size] by the positions 0, 1, ..."""
    angles = torch.arange(len(x), dtype=x.dtype)[:, None, None] * torch.tensor(rotary.frequencies, dtype=x.dtype)
    cosines, sines = rotary.scale * angles.cos(), rotary.scale * angles.sin()
    out = x.clone()
    part, half = out[..., rotary.first : rotary.first + rotary.width], rotary.width // 2
    low, high = (part[..., ::2], part[..., 1::2]) if rotary.interleaved else (part[..., :half], part[..., half:])
    turned = low * cosines - high * sines, high * cosines + low * sines
    low.copy_(turned[0])
    high.copy_(turned[1])
    return out


def _attend(part: Attention, values: Parameters, parameters: Parameters) -> Tensor:
    def heads(source: Source, count: int) -> Tensor:
        return evaluate(source, values).unflatten(1, (count, -1))

    query, key = heads(part.query, part.heads), heads(part.key, part.kv_heads)
    if part.rotary is not None:
        query, key = rotate(query, part.rotary), rotate(key, part.rotary)
    return attend(part, query, key, heads(part.value, part.kv_heads), parameters)


def attend(part: Attention, query: Tensor, key: Tensor, value: Tensor, parameters: Parameters) -> Tensor:
    """Attention of rotated queries [T, N, D] to all tokens of their sequence up to theirs, [T, N * Dv]."""
    groups = part.heads // part.kv_heads
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.einsum("tnd,snd->nts", query, key) * part.scale
    if part.softcap is not None:
        scores = part.softcap * torch.tanh(scores / part.softcap)
    at = torch.arange(len(query))
    seen = at[None] <= at[:, None]
    if part.window is not None:
        seen &= at[None] > at[:, None] - part.window
    scores = scores.masked_fill(~seen, -torch.inf)
    if part.sinks is not None:
        sinks = parameters[part.sinks][:, None, None].expand(-1, len(query), 1)
        scores = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    else:
        scores = scores.softmax(-1)
    return torch.einsum("nts,snd->tnd", scores, value).flatten(1)


def mix(part: Experts, x: Tensor, logits: Tensor | None, parameters: Parameters) -> Tensor:
    """The mixture's output [T, H] from its input. `logits` [T, E], unless the router's own weight gives them."""
    router = part.router
    scores = x @ parameters[router.logits].T if logits is None else logits
    flat = {name: parameters[name].flatten() for name in (router.bias, router.choice_bias) if name is not None}
    chosen, weights = route(router, scores, flat)

    def product(rows: Tensor, name: str, expert: int) -> Tensor:
        weight = parameters[f"{part.name}.{name}"][expert]
        out = rows @ (weight if part.transposed else weight.T)
        return out + parameters[f"{part.name}.{name}_bias"][expert] if part.bias else out

    total = torch.zeros_like(x)
    for expert in range(part.count):
        rows, place = (chosen == expert).nonzero(as_tuple=True)
        both = product(x[rows], "gate_up_proj", expert)
        gate, up = (both[:, ::2], both[:, 1::2]) if part.interleaved else both.chunk(2, dim=1)
        gated = swiglu_oss(gate, up) if part.activation == "swiglu_oss" else ACTIVATIONS[part.activation](gate) * up
        total.index_add_(0, rows, product(gated, "down_proj", expert) * weights[rows, place, None])
    return total
