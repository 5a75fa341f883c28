"""Reads the parts of a model off transformers' modules. The model stays on the meta device, without weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers.configuration_utils import PretrainedConfig

from ..plain import hf
from ..plain.layout import find_layout
from .description import LayerParts, ModelParts
from .reading.ends import read_ends
from .reading.layer import Model, read_layer, signature
from .reading.record import SEED, Recording, is_experts


def read_parts(config: PretrainedConfig) -> ModelParts:
    """Reads the parts of the model that this config describes.

    Raises:
        NotKnown: something in it is none of the known parts.
        UnsupportedModel: it cannot be split into stages.
    """
    hf.register_attention(Recording().attention)
    model = hf.build_on_meta(config, torch.float64)
    hf.run_experts_one_by_one(model)
    layout = find_layout(model, config)
    hf.compute_buffers(model, torch.device("cpu"))
    hidden, vocab = int(config.hidden_size), int(config.vocab_size)
    softcap = getattr(config, "final_logit_softcapping", None)
    common = Model(
        hidden,
        [buffer for name, buffer in model.named_buffers() if "inv_freq" in name],
        (int(getattr(config, "n_group", None) or 1), int(getattr(config, "topk_group", None) or 1)),
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        _fill(model)
        ends = read_ends(model, layout, hidden, vocab, float(softcap) if softcap else None)
        layers: list[LayerParts] = []
        known: dict[object, int] = {}
        kinds: list[int] = []
        all_layers = getattr(getattr(model, layout.base_prefix), layout.layers)
        for index, (layer, given) in enumerate(zip(all_layers, ends.given, strict=True)):
            key = signature(layer, given)
            if key not in known:
                known[key] = len(layers)
                layers.append(read_layer(index, layer, given, common))
            kinds.append(known[key])
    return ModelParts(
        hidden=hidden,
        vocab=vocab,
        layers=tuple(layers),
        kinds=tuple(kinds),
        embedding_scale=ends.embedding_scale,
        final_norm=ends.final_norm,
        head_bias=ends.head_bias,
        logits_scale=ends.logits_scale,
        logits_softcap=ends.logits_softcap,
    )


def _fill(model: nn.Module) -> None:
    """Gives small parameters random numbers in memory: all but those of linears, experts and embeddings."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) or is_experts(module):
            continue
        for name, old in list(module.named_parameters(recurse=False)):
            new = torch.randn(old.shape).to(old.dtype)
            if old.ndim > 1:  # A router's weight. Its scores must be neither all alike nor all 0 or 1.
                new *= 0.75 * old.shape[-1] ** -0.5
            setattr(module, name, nn.Parameter(new, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if "bias" in name:  # A router's correction. It must not outweigh the scores.
                buffer.copy_(0.1 * torch.randn(buffer.shape))
