"""Resources of an assignment: a shard of the model, its KV pages, and the journal of the activations that it sent."""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.protos.v1 import types_pb2

from ...kv.copy import PageFrames
from ...kv.journal import Journal
from ...kv.page_ranges import PageRanges
from ...kv.pool import KvPool
from ...model.choose import Shard
from ...model.spec import ShardSpec
from ...sampling.drafter import Drafter


@dataclass(frozen=True, eq=False)
class StageResources:
    """Resources that assignments of the same layers share, over several epochs."""

    shard: Shard
    pool: KvPool
    drafter: Drafter | None
    ranges: PageRanges
    journal: Journal | None
    salt: int
    """A number that makes page generations differ between layer ranges, even if they share page ranges."""
    wanted: list[tuple[ShardSpec, str]]
    """The requested shard and checkpoint fingerprint, for the model and then for the draft model."""

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, including the draft model's part."""
        return self.pool.bytes_per_page + (self.drafter.pool.bytes_per_page if self.drafter else 0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, including the draft model's."""
        return self.shard.weight_bytes + (self.drafter.shard.weight_bytes if self.drafter else 0)

    def frames(self, layers: types_pb2.LayerRange) -> PageFrames:
        """Returns pages of some layers, for a copy. Pages of the last layer include the draft model's."""
        parts: list[tuple[KvPool, list[int]]] = [(self.pool, list(range(layers.first, layers.last)))]
        if self.drafter is not None and layers.last == self.shard.kv_layers[-1].layer_idx + 1:
            parts.append((self.drafter.pool, [layer.layer_idx for layer in self.drafter.pool.layers]))
        return PageFrames(parts)


def page_share(num_pages: int, limits: types_pb2.RunLimits) -> int:
    """Returns the number of pages that each gateway gets on each pipeline."""
    return num_pages // (max(1, limits.gateways) * max(1, limits.pipelines))
