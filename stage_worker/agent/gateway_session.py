"""A gateway's stream at a worker's agent: what is still to be read by it, bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from stagemesh.errors import RanksDied, StageLost, StagemeshError
from stagemesh.processes.frames import parse
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
    _copied: dict[bytes, set[int]] = field(default_factory=dict)
    """Pages that have come on some ranks, not yet on all."""

    async def responses(self) -> AsyncIterator[bytes]:
        """What the gateway is told, up to why its stream ends."""
        while not isinstance(item := await self.outbox.get(), StagemeshError):
            yield item
        ended = stage_pb2.RunEnded(reason=item.reason, message=item.message, ranks_died=isinstance(item, RanksDied))
        yield stage_pb2.RunResponse(ended=ended).SerializeToString()

    def copied_on(self, rank: int, pages: bytes) -> None:
        """Pages have come on one rank; the gateway is told when they have on all."""
        ranks = self._copied.setdefault(pages, set())
        ranks.add(rank)
        if len(ranks) == self.group.size:
            del self._copied[pages]
            self.put(stage_pb2.RunResponse(copied=parse(stage_pb2.PagesCopied, pages)).SerializeToString())

    def put(self, item: bytes | StagemeshError) -> None:
        """Queues a frame; a gateway that does not read is dropped rather than buffered without bound."""
        try:
            self.outbox.put_nowait(item)
        except asyncio.QueueFull:
            while not self.outbox.empty():
                self.outbox.get_nowait()
            self.outbox.put_nowait(StageLost(f"this gateway left {OUTBOX_FRAMES} results unread"))
