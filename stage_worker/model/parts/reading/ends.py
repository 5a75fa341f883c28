"""Reads what is before and after the layers, and what each layer is given beside hidden states.

The model's own loop runs once. Embedding, layers, norm and head are replaced and return random numbers.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from ...plain.layout import Layout
from ..description import INPUT, Norm, Sum
from .explain import NotKnown, same
from .norms import read_norm
from .record import POSITIONS, TOKENS, Given, is_norm, noise


@dataclass(frozen=True)
class Ends:
    """The parts of a model that are not layers. See `ModelParts` for what they mean."""

    embedding_scale: float
    final_norm: Norm
    head_bias: bool
    logits_scale: float
    logits_softcap: float | None
    given: tuple[Given, ...]
    """For each layer."""


def read_ends(model: PreTrainedModel, layout: Layout, hidden: int, vocab: int, softcap: float | None) -> Ends:
    """Reads the ends of a model.

    Raises:
        NotKnown: they are not an embedding, a norm and a head, each with a factor at most.
    """
    base = getattr(model, layout.base_prefix)
    layers: list[nn.Module] = list(getattr(base, layout.layers))
    embedding: nn.Module = model.get_input_embeddings()
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    norms = [module for name in layout.after if is_norm(module := getattr(base, name))]
    if head is None or len(norms) != 1:
        raise NotKnown("its ends are not an embedding, a norm and a head")
    with ExitStack() as stack:

        def replace(module: nn.Module, width: int) -> _Replaced:
            return stack.enter_context(_Replaced(module, width))

        embedded = replace(embedding, hidden)
        of_layers = [replace(layer, hidden) for layer in layers]
        normed, headed = replace(norms[0], hidden), replace(head, vocab)
        ids = torch.arange(TOKENS)[None]
        logits = model(input_ids=ids, position_ids=POSITIONS[None], use_cache=False).logits
    scale = _factor(of_layers[0].x, embedded.out, "the first layer's input") * _embedding_scale(embedding)
    if _factor(normed.x, of_layers[-1].out, "the final norm's input") != 1.0:
        raise NotKnown("the last layer's output is scaled")
    before_head = _factor(headed.x, normed.out, "the head's input")
    return Ends(
        embedding_scale=scale,
        final_norm=read_norm("", norms[0], Sum(((INPUT, 1.0),)), hidden),
        head_bias=getattr(head, "bias", None) is not None,
        logits_scale=before_head * _logits_scale(logits.double(), headed.out, softcap),
        logits_softcap=softcap,
        given=tuple(layer.given for layer in of_layers),
    )


class _Replaced:
    """A module that returns random numbers [1, T, width] as long as the context is open. Keeps what it was given."""

    def __init__(self, module: nn.Module, width: int) -> None:
        self._module, self._width = module, width
        self.x: Tensor = torch.empty(0)
        self.out: Tensor = torch.empty(0)
        self.given = Given((), {})

    def __enter__(self) -> _Replaced:
        self._module.forward = self._forward
        return self

    def __exit__(self, *_: object) -> None:
        del self._module.forward

    def _forward(self, *args: Any, **named: Any) -> Tensor:
        x: Tensor = args[0] if args else named.pop("hidden_states")
        out = noise((1, TOKENS, self._width), torch.float64)
        self.x, self.out, self.given = x.clone(), out.clone(), Given(args[1:], named)
        return out


def _embedding_scale(embedding: nn.Module) -> float:
    """Returns the factor that the embedding itself puts to its rows, as Gemma's does."""
    kept, padding = embedding.get_parameter("weight"), getattr(embedding, "padding_idx", None)
    rows = torch.randn(TOKENS, kept.shape[1], dtype=torch.float64)
    embedding.register_parameter("weight", nn.Parameter(rows, requires_grad=False))
    if padding is not None:
        vars(embedding)["padding_idx"] = None  # It may be beyond these few rows.
    try:
        return _factor(embedding(torch.arange(TOKENS)), rows, "the embedding's output")
    finally:
        embedding.register_parameter("weight", kept)
        vars(embedding)["padding_idx"] = padding


def _logits_scale(logits: Tensor, of_head: Tensor, softcap: float | None) -> float:
    small = of_head.abs() < 1.0
    raw = logits if softcap is None else softcap * torch.atanh(logits / softcap)
    factor = _rounded(raw[small] / of_head[small])
    made = of_head * factor
    if not same(made if softcap is None else softcap * torch.tanh(made / softcap), logits):
        raise NotKnown("its logits are not the head's output times a number, with or without a soft cap")
    return factor


def _factor(x: Tensor, of: Tensor, what: str) -> float:
    if x.shape == of.shape:
        factor = _rounded(x / of)
        if same(of * factor, x.double()):
            return factor
    raise NotKnown(f"{what} is not what comes before it times a number")


def _rounded(factors: Tensor) -> float:
    return float(f"{float(factors.median()):.6g}")
