"""The interface of a shard, and the choice of its kind. A kind is imported only if it is used."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stagemesh.errors import CheckpointError
from stagemesh.models.support import PLUGINS

from ..kv.pool import KvLayerSpec, KvPool
from ..native import ops
from ..native.model import KernelModel, NotNative, read_model
from .batch import StepBatch
from .parallel import TensorParallel
from .spec import ShardSpec

log = logging.getLogger(__name__)


class Shard(Protocol):
    """Layers [first, last) of one model on one rank."""

    on_layer: Callable[[], None] | None
    """Callback between layers, in which the caller drives its transports."""

    hidden_size: int
    """Hidden size H, the width of activations between stages."""
    vocab_size: int
    """Vocabulary size V."""
    dtype: torch.dtype
    """Element type of activations and KV pages."""
    device: torch.device
    """Device on which the shard computes."""
    weight_bytes: int
    """Bytes of weights in memory."""
    tensor_bytes_read: int
    """Bytes of weights read from the checkpoint."""
    kv_layers: list[KvLayerSpec]
    """KV data of one token, for each layer of the shard."""
    cores: tuple[int, int]
    """Cores that compute a step: always, and while nothing else computes (`StepBatch.alone`)."""
    kv_layout: str
    """Name of the layout within a page. Shards that exchange pages must have the same."""

    def bind_kv(self, pool: KvPool) -> None:
        """Makes the shard use these pages from now on."""

    def prepare(self, batch: StepBatch) -> None:
        """Prepares what the layers need for a step, before its activation arrives."""

    def forward(self, batch: StepBatch) -> Tensor:
        """Computes one step. Returns hidden states [T, H], or logits [R, V] in fp32 on the last stage."""


_registered: dict[str, Callable[[ShardSpec], Shard]] = {}


def register_shard(model_type: str, make: Callable[[ShardSpec], Shard]) -> None:
    """Makes `make` serve checkpoints whose config.json has this model type."""
    _registered[model_type] = make


def _registered_for(model_dir: str) -> Callable[[ShardSpec], Shard] | None:
    if not _registered:
        return None
    try:
        config = json.loads((Path(model_dir) / "config.json").read_bytes())
    except (OSError, ValueError):
        return None  # The loader reports what is wrong.
    return _registered.get(str(config.get("model_type"))) if isinstance(config, dict) else None


def load_shard(
    spec: ShardSpec,
    parallel: TensorParallel,
    on_progress: Callable[[int, int], None] | None = None,
    before: Shard | None = None,
) -> Shard:
    """Builds the shard that `spec` describes and loads its weights. `on_progress(done, total)` counts their bytes;
    both are 0 while the model is described.

    It uses compiled kernels if they support the model, else transformers' own modules. With `tp_size` above one, every
    rank calls this with its own rank and its `parallel` of the same group.

    `before`: another range of the same model in memory, if there is one. The compiled kernels share its layers.

    Raises:
        UnsupportedModel: the architecture cannot be split, or not this way.
        ConfigError: layer range or TP size do not fit the model.
        CheckpointError: a tensor is missing, has the wrong shape, or its file is damaged.
    """
    make = _registered_for(spec.model_dir)
    if make is not None:
        return make(spec)
    try:
        model = kernel_model(spec, None if on_progress is None else lambda: on_progress(0, 0))
    except NotNative as e:
        slow = spec.device == "cpu" and not spec.enforce_eager
        log.log(
            logging.WARNING if slow else logging.INFO,
            "layers %d-%d run through transformers' modules%s: %s",
            *(spec.first, spec.last - 1, ", several times slower than compiled kernels" if slow else "", e),
        )
        from .plain.load import load_shard as load_plain_shard

        group = parallel.group() if spec.tp_size == parallel.size > 1 else None
        plain = load_plain_shard(spec, group, on_progress)
        if spec.deterministic or spec.enforce_eager or plain.device.type != "cuda" or spec.tp_size > 1:
            return plain
        from .plain.graphs import GraphedShard

        return GraphedShard(plain)
    from ..native.shard import NativeShard

    exchange = parallel.exchange() if spec.tp_size > 1 else None
    shared = before if isinstance(before, NativeShard) and before.same_model(spec) else None
    shard = NativeShard(spec, model, exchange, on_progress, shared)
    tiles = shard.dtype == torch.bfloat16 and ops.has_tiles()
    how = "AMX tiles" if tiles else "vectors"
    log.info("layers %d-%d run through compiled kernels, linears by %s", spec.first, spec.last - 1, how)
    return shard


def kernel_model(spec: ShardSpec, on_wait: Callable[[], None] | None = None) -> KernelModel:
    """Describes the model for the compiled kernels. Raises NotNative with the reason if they cannot serve it.

    `on_wait` is called all the time while another process describes it.
    """
    if spec.enforce_eager:
        raise NotNative("--enforce-eager")
    if spec.device != "cpu":
        raise NotNative(f"the kernels are for a CPU, not {spec.device}")
    return read_model(spec, on_wait)


def import_for(spec: ShardSpec) -> None:
    """Imports the slow modules of `load_shard`, if the model is known before an assignment."""
    for name in filter(None, os.environ.get(PLUGINS, "").split(",")):
        importlib.import_module(name)
    if not spec.model_dir or _registered_for(spec.model_dir) is not None:
        return
    try:
        try:
            kernel_model(spec)
        except CheckpointError:  # Perhaps its weights are dummy ones. If not, the load says what is wrong.
            kernel_model(replace(spec, load_format="dummy"))
    except NotNative:
        importlib.import_module(".plain.load", __package__)
