"""What a rank holds as its shard, and which kind it is made as; a kind is imported only where it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..attention.base import AttentionMetadata
from ..kv import KvLayerSpec, KvPool
from ..tp import TPGroup
from .batch import StepBatch
from .sleeping import SleepShard, sleeps
from .spec import ShardSpec


class Shard(Protocol):
    """Layers [first, last) of one model on one rank."""

    on_layer: Callable[[], None] | None
    """Called between layers: the caller drives its transports."""

    @property
    def hidden_size(self) -> int:
        """H, the width of what crosses a boundary."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and KV."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in memory."""

    @property
    def tensor_bytes_read(self) -> int:
        """Bytes of weights read from the checkpoint."""

    @property
    def kv_layers(self) -> Sequence[KvLayerSpec]:
        """What each own layer keeps of a token."""

    def bind_kv(self, pool: KvPool) -> None:
        """Use these pages from now on."""

    def prepare(self, metadata: AttentionMetadata) -> None:
        """Make what the layers need of a step before its activation is there."""

    def forward(self, batch: StepBatch) -> Tensor:
        """One step: hidden states [T, H], or on the last stage logits [R, V] in fp32."""


def preload(model_dir: str | None) -> None:
    """Imports what `load_shard` will need, so that an assignment does not wait for it."""
    if model_dir is None or not sleeps(model_dir):
        importlib.import_module(".load", __package__)


def load_shard(spec: ShardSpec, group: TPGroup | None, on_progress: Callable[[int, int], None]) -> Shard:
    """The shard that `spec` describes; errors and arguments are those of `load.load_shard`."""
    if sleeps(spec.model_dir):
        return SleepShard(spec)
    from .load import load_shard as load_model_shard

    return load_model_shard(spec, group, on_progress)
