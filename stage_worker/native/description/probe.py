"""Proves that the compiled kernels compute what transformers' modules do, before they serve a model.

One layer of each kind runs both ways with random weights at its true size: a prompt and then single tokens, over pages.
A mixture of experts that is too large for that is proved with fewer experts.
"""

from __future__ import annotations

import logging
import math
import tempfile
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor
from transformers.configuration_utils import PretrainedConfig

from ...kv.pool import KvPool
from ...model.batch import StepBatch
from ...model.parts.describe import describe
from ...model.parts.description import Experts, LayerParts
from ...model.parts.model import ModelDescription
from ...model.plain.load import load_shard
from ...model.plain.shard import ModelShard
from ...model.spec import ShardSpec
from .. import ops
from ..model import compiled
from ..shard import NativeShard

PROMPT, SINGLE, PAGE_SIZE = 37, 3, 16
"""Tokens of the prompt, tokens after it, and positions of a page."""
LARGEST = 500_000_000
"""Numbers in a layer that is proved at its true size. Both ways together need eight bytes for each."""
TOLERANCE = 1e-3
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What the number of experts is called in configs."""

log = logging.getLogger(__name__)


class Differs(Exception):
    """The kernels compute something else than the modules. Says in which layer, and by how much."""


def prove(config: PretrainedConfig, description: ModelDescription) -> None:
    """Runs a layer of each kind both ways. Does nothing where there are no kernels.

    Raises:
        Differs: the outputs are not the same but for rounding.
        NoKernel: the kernels cannot compute a layer.
        NotKnown: with fewer experts, the model is made of other parts.
    """
    if ops.library() is None:
        return
    kinds = range(len(description.parts.layers))
    large = [kind for kind in kinds if _numbers(description, kind) > LARGEST]
    if large:
        config, smaller = _with_fewer_experts(config, description)
        if [_without_counts(layer) for layer in smaller.parts.layers] != [
            _without_counts(layer) for layer in description.parts.layers
        ]:
            raise Differs("with fewer experts, it is made of other parts")
        description = smaller
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        for kind in kinds:
            if _numbers(description, kind) > LARGEST:
                log.warning("layers with %d numbers are too large to be proved", _numbers(description, kind))
                continue
            layers = [index for index, other in enumerate(description.parts.kinds) if other == kind]
            _prove_layer(folder, description, layers[len(layers) // 2])


def _prove_layer(folder: str, description: ModelDescription, index: int) -> None:
    spec = ShardSpec(folder, index, index + 1, "float32", load_format="dummy", page_size=PAGE_SIZE)
    outputs = [_run(NativeShard(spec, compiled(description, spec), None)), _run(load_shard(spec))]
    error = max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in zip(*outputs, strict=True))
    if not error < TOLERANCE:
        raise Differs(f"the kernels' output of layer {index} differs by {error:.1e} from that of transformers' module")


@torch.inference_mode()
def _run(shard: NativeShard | ModelShard) -> list[Tensor]:
    """Computes a prompt and single tokens after it. Returns the output of each step."""
    pages = math.ceil((PROMPT + SINGLE) / PAGE_SIZE)
    shard.bind_kv(KvPool(shard.kv_layers, pages, PAGE_SIZE, shard.dtype, shard.device))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(PROMPT + SINGLE, shard.hidden_size, generator=generator)
    ids = torch.randint(0, shard.vocab_size, (PROMPT + SINGLE,), generator=generator)
    found, start = [], 0
    for count in (PROMPT, *[1] * SINGLE):
        some = slice(start, start + count)
        batch = StepBatch(
            [start], [count], [list(range(pages))], PAGE_SIZE, ids[some], hidden[some], torch.arange(count)
        )
        found.append(shard.forward(batch).clone())
        start += count
    return found


def _numbers(description: ModelDescription, kind: int) -> int:
    return sum(math.prod(shape) for shape in description.shapes[kind].values())


def _with_fewer_experts(
    config: PretrainedConfig, description: ModelDescription
) -> tuple[PretrainedConfig, ModelDescription]:
    routers = [part.router for layer in description.parts.layers for part in layer.parts if isinstance(part, Experts)]
    if not routers:
        return config, description
    groups = max(router.groups for router in routers)
    in_group = max(*(math.ceil(2 * router.used / router.groups_used) for router in routers), 2)
    config = deepcopy(config)
    for name in _COUNTS:
        if getattr(config, name, None):
            setattr(config, name, groups * in_group)
    return config, describe(config, None)


def _without_counts(layer: LayerParts) -> LayerParts:
    return replace(
        layer, parts=tuple(replace(part, count=0) if isinstance(part, Experts) else part for part in layer.parts)
    )
