"""One gateway's Run stream at an agent, with a bounded queue of what the gateway has not read yet."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from stagemesh.errors import StageLost, StagemeshError
from stagemesh.protos.v1 import stage_pb2

from .rank_group import RankGroup

OUTBOX_FRAMES = 1024


@dataclass
class GatewaySession:
    """State of one Run stream."""

    ident: int
    open: stage_pb2.RunOpen
    group: RankGroup
    """The ranks that have the session open. Ranks that replace them later do not know it."""
    outbox: asyncio.Queue[bytes | StagemeshError] = field(default_factory=lambda: asyncio.Queue(OUTBOX_FRAMES))
    copied: dict[bytes, set[int]] = field(default_factory=dict)
    """Copied pages -> ranks on which they have arrived. An entry goes when all ranks have them."""

    def put(self, item: bytes | StagemeshError) -> None:
        """Queues a frame. Where the queue is full, the gateway does not read: its stream ends with StageLost."""
        try:
            self.outbox.put_nowait(item)
        except asyncio.QueueFull:
            while not self.outbox.empty():
                self.outbox.get_nowait()
            self.outbox.put_nowait(StageLost(f"this gateway left {OUTBOX_FRAMES} results unread"))
