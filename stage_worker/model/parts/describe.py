"""Describes a model: its parts, and where its parameters are in a checkpoint. It is built on the meta device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from ..plain import hf
from ..plain.layout import Layout, find_layout
from .description import Linear, ModelParts
from .model import ModelDescription, Stored
from .read import read_parts
from .reading.explain import NotKnown
from .reading.record import is_norm

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def describe(config: PretrainedConfig, names: Sequence[str] | None) -> ModelDescription:
    """Describes the model of a config. `names`: the checkpoint's tensors, or None if there is no checkpoint.

    Raises:
        NotKnown: it has a part that is none of the known, or a parameter that is made of tensors in no known way.
        UnsupportedModel: it cannot be split into stages.
        CheckpointError: the checkpoint lacks tensors of some experts.
    """
    parts = read_parts(config)
    model = hf.build_on_meta(config, torch.float32)
    layout = find_layout(model, config)
    base = getattr(model, layout.base_prefix)
    of_name = {id(module): name for name, module in model.named_modules()}
    norms = [module for name in layout.after if is_norm(module := getattr(base, name))]
    named = config.dtype if isinstance(config.dtype, torch.dtype) else None
    return ModelDescription(
        parts=parts,
        shapes=_shapes(getattr(base, layout.layers), parts),
        layers=f"{layout.base_prefix}.{layout.layers}",
        embedding=f"{of_name[id(model.get_input_embeddings())]}.weight",
        norm=of_name[id(norms[0])],
        head=of_name[id(model.get_output_embeddings())],  # type: ignore[no-untyped-call]
        tied=bool(config.tie_word_embeddings) and bool(hf.tied_weights(model)),
        dtype=_DTYPES.get(named) if named is not None else None,
        stored={} if names is None else _stored(model, layout, names),
        ignored=hf.ignored_names(model),
    )


def _shapes(layers: nn.ModuleList, parts: ModelParts) -> tuple[dict[str, tuple[int, ...]], ...]:
    """Returns the shapes of each kind of layer. Raises NotKnown if its layers differ in them."""
    found: list[dict[str, tuple[int, ...]]] = [{} for _ in parts.layers]
    for layer, kind in zip(layers, parts.kinds, strict=True):
        own = {name: tuple(tensor.shape) for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}
        for part in parts.layers[kind].parts:
            if isinstance(part, Linear) and f"{part.name}.weight" not in own:
                raise NotKnown(f"the linear {part.name} has no weight")
        if found[kind] not in ({}, own):
            raise NotKnown("layers of one kind have different shapes")
        found[kind] = own
    return tuple(found)


def _stored(model: PreTrainedModel, layout: Layout, names: Sequence[str]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for source in hf.map_checkpoint(model, names):
        if source.transform is None:
            stored = Stored(((source.tensors[0][0],),))
        else:
            experts = hf.experts(source)
            if experts is None:
                kinds = ", ".join(type(operation).__name__ for operation in source.transform.operations)
                raise NotKnown(f"{source.targets[0]} is made of stored tensors by {kinds}")
            stored = Stored(tuple(experts), stacked=True)
        if stored.tensors != ((source.targets[0],),):
            found[source.targets[0]] = stored
    return found
