"""One gateway's Run stream at an agent, with a bounded queue of messages that the gateway has not read yet."""

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
    """State of one Run stream."""

    ident: int
    open: stage_pb2.RunOpen
    group: RankGroup
    """The ranks that have the session open. Ranks that replace them later do not know this session."""
    outbox: asyncio.Queue[bytes | StagemeshError] = field(default_factory=lambda: asyncio.Queue(OUTBOX_FRAMES))
    _copied: dict[bytes, set[int]] = field(default_factory=dict)
    """Copied pages -> ranks on which they have arrived. An entry is removed when all ranks have the pages."""

    async def responses(self) -> AsyncIterator[bytes]:
        """Yields messages for the gateway. The last one says why the stream ends."""
        while not isinstance(item := await self.outbox.get(), StagemeshError):
            yield item
        ended = stage_pb2.RunEnded(reason=item.reason, message=item.message, ranks_died=isinstance(item, RanksDied))
        yield stage_pb2.RunResponse(ended=ended).SerializeToString()

    def copied_on(self, rank: int, pages: bytes) -> None:
        """Records that pages have arrived on one rank. Tells the gateway when all ranks have them."""
        ranks = self._copied.setdefault(pages, set())
        ranks.add(rank)
        if len(ranks) == self.group.size:
            del self._copied[pages]
            self.put(stage_pb2.RunResponse(copied=parse(stage_pb2.PagesCopied, pages)).SerializeToString())

    def put(self, item: bytes | StagemeshError) -> None:
        """Queues a frame. If the queue is full, the gateway does not read, and its stream ends with StageLost."""
        try:
            self.outbox.put_nowait(item)
        except asyncio.QueueFull:
            while not self.outbox.empty():
                self.outbox.get_nowait()
            self.outbox.put_nowait(StageLost(f"this gateway left {OUTBOX_FRAMES} results unread"))
