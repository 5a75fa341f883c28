"""What one assignment runs on: a shard of the model, its KV pages, and the journal of what it sent on."""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.protos.v1 import types_pb2

from ...kv.copy import PageFrames
from ...kv.journal import Journal
from ...kv.page_ranges import PageRanges
from ...kv.pool import KvPool
from ...model.choose import Shard
from ...sampling.drafter import Drafter


@dataclass(frozen=True, eq=False)
class StageResources:
    """Several assignments share one, where they are epochs of the same layers."""

    shard: Shard
    pool: KvPool
    drafter: Drafter | None
    ranges: PageRanges
    journal: Journal | None
    salt: int
    """Of the generations of its pages: other layers' pages never look like these, though they have ranges in common."""

    @property
    def page_bytes(self) -> int:
        """Of one page, the draft model's part included."""
        return self.pool.bytes_per_page + (self.drafter.pool.bytes_per_page if self.drafter else 0)

    @property
    def weight_bytes(self) -> int:
        """Of all weights, the draft model's included."""
        return self.shard.weight_bytes + (self.drafter.shard.weight_bytes if self.drafter else 0)

    def frames(self, layers: types_pb2.LayerRange) -> PageFrames:
        """Pages of some layers, as they go to another worker. The last layer's bring the draft model's along."""
        parts: list[tuple[KvPool, list[int]]] = [(self.pool, list(range(layers.first, layers.last)))]
        if self.drafter is not None and layers.last == self.shard.kv_layers[-1].layer_idx + 1:
            parts.append((self.drafter.pool, [layer.layer_idx for layer in self.drafter.pool.layers]))
        return PageFrames(parts)


def page_share(num_pages: int, limits: types_pb2.RunLimits) -> int:
    """Pages that each gateway is granted on each pipeline."""
    return num_pages // (max(1, limits.gateways) * max(1, limits.pipelines))
