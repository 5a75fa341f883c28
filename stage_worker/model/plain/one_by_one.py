"""A shard whose result for a token has the same bits whatever else is in the step: each token is computed by itself.

What `--deterministic` needs of transformers' modules, whose matrix products sum in another order for another number of
rows. The compiled kernels need none of this. Prompts take as many passes over the weights as they have tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kv.pool import KvPool
from ..batch import StepBatch
from .shard import ModelShard


class OneByOneShard:
    """Another shard, one token at a time."""

    def __init__(self, shard: ModelShard) -> None:
        self._shard = shard
        self.kv_layout, self.kv_layers = shard.kv_layout, shard.kv_layers
        self.hidden_size, self.vocab_size = shard.hidden_size, shard.vocab_size
        self.dtype, self.device = shard.dtype, shard.device
        self.weight_bytes, self.tensor_bytes_read = shard.weight_bytes, shard.tensor_bytes_read

    @property
    def on_layer(self) -> Callable[[], None] | None:
        """See `Shard`."""
        return self._shard.on_layer

    @on_layer.setter
    def on_layer(self, call: Callable[[], None] | None) -> None:
        self._shard.on_layer = call

    def bind_kv(self, pool: KvPool) -> None:
        """See `Shard`."""
        self._shard.bind_kv(pool)

    def prepare(self, batch: StepBatch) -> None:
        """Nothing: each token is prepared when it is computed."""

    def forward(self, batch: StepBatch) -> Tensor:
        """See `Shard`."""
        wanted = set(batch.logit_rows.tolist()) if batch.logit_rows is not None else set()
        outputs: list[Tensor] = []
        at = 0
        for start, count, table in zip(batch.starts, batch.counts, batch.tables, strict=True):
            for position in range(start, start + count):
                one = StepBatch(
                    starts=[position],
                    counts=[1],
                    tables=[table],
                    page_size=batch.page_size,
                    token_ids=batch.token_ids[at : at + 1] if batch.token_ids is not None else None,
                    hidden=batch.hidden[at : at + 1] if batch.hidden is not None else None,
                    logit_rows=self._logit_rows(at in wanted) if batch.logit_rows is not None else None,
                )
                self._shard.prepare(one)
                outputs.append(self._shard.forward(one).clone())
                at += 1
        return torch.cat(outputs)

    def _logit_rows(self, wanted: bool) -> Tensor:
        return torch.zeros(1 if wanted else 0, dtype=torch.int64, device=self.device)
