"""A gateway's stream at a worker's agent: what is still to be read by it, bounded."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from stagemesh.errors import StageLost, StagemeshError
from stagemesh.protos.v1 import stage_pb2

from .rank_group import RankGroup

OUTBOX_FRAMES = 1024


@dataclass
class GatewaySession:
    """One gateway's Run stream."""

    ident: int
    open: stage_pb2.RunOpen
    group: RankGroup
    """The ranks that hold it; those that take their place know nothing of it."""
    outbox: asyncio.Queue[bytes | StagemeshError] = field(default_factory=lambda: asyncio.Queue(OUTBOX_FRAMES))
    copied: dict[bytes, set[int]] = field(default_factory=dict)
    """Pages that have come on some ranks, not yet on all."""

    def put(self, item: bytes | StagemeshError) -> None:
        """Queues a frame; a gateway that does not read is dropped rather than buffered without bound."""
        try:
            self.outbox.put_nowait(item)
        except asyncio.QueueFull:
            while not self.outbox.empty():
                self.outbox.get_nowait()
            self.outbox.put_nowait(StageLost(f"this gateway left {OUTBOX_FRAMES} results unread"))
