"""The I/O of one pipeline at one epoch: a stream to every stage's worker. It decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from stagemesh.errors import Unavailable
from stagemesh.protos.v1 import stage_pb2, types_pb2

from ..schedule.pages import Shape
from ..timing import GatewayTiming
from .run_stream import RunStream, SessionEvents
from .slot_lease import SlotLease


class Session:
    """Streams to all stages of `view`."""

    def __init__(self, view: types_pb2.PipelineView, heard_by: SessionEvents, timing: GatewayTiming) -> None:
        self.view = view
        self._timing = timing
        self._streams = [RunStream(stage, heard_by, timing) for stage in view.stages]
        self.opened: list[stage_pb2.RunOpened] = []
        """Each stage's answer when the session was opened."""
        self._pages: tuple[int, ...] = ()

    async def open(self, slot: SlotLease, pages: Sequence[int] | None) -> None:
        """Opens a session on every stage. `pages`: ids to ask for; None: as many as allowed.

        Raises the first stage's error, or Unavailable if too few pages are granted.
        """
        opening = [asyncio.create_task(stream.open(self.view, slot, pages)) for stream in self._streams]
        try:
            self.opened = await asyncio.gather(*opening)
        except Unavailable:
            if self.unreachable:
                # Wait for the others: if no worker can be reached, this gateway is cut off.
                await asyncio.wait(opening, timeout=self._timing.reach_s)
            raise
        granted = min(opened.num_pages for opened in self.opened)
        self._pages = tuple(range(granted) if pages is None else pages)
        if granted < len(self._pages):
            raise Unavailable(f"{granted} of {len(self._pages)} KV pages are granted", retry_after_s=0.2)

    @property
    def unreachable(self) -> list[str]:
        """Workers that did not answer when sessions were opened."""
        return [stream.stage.worker_id for stream in self._streams if stream.unreachable]

    @property
    def share(self) -> int:
        """Number of KV pages that a gateway may have on every stage."""
        return min(stage.num_pages for stage in self.view.stages)

    @property
    def shape(self) -> Shape:
        """The pages and steps in flight that all stages grant."""
        opened = self.opened
        return Shape(self._pages, opened[0].page_size, min(o.steps_in_flight for o in opened))

    @property
    def more_cores(self) -> float:
        """Number of times as many cores that a step has on each stage while nothing else computes."""
        return min(o.cores_alone / o.cores if o.cores else 1.0 for o in self.opened)

    def copy_pages(self, stage: int) -> int:
        """Most pages in one message of a copy to a stage."""
        return self.opened[stage].copy_pages

    def tell(self, stage: int, message: stage_pb2.RunRequest) -> None:
        """Sends a message to one stage."""
        self._streams[stage].send(message.SerializeToString())

    def broadcast(self, message: stage_pb2.RunRequest) -> None:
        """Sends a message to every stage, serialized once."""
        data = message.SerializeToString()
        for stream in self._streams:
            stream.send(data)

    async def hear_out(self) -> None:
        """Waits until every stream has ended by itself, at most for `last_words_s`."""
        readers = [stream.reader for stream in self._streams if stream.reader is not None]
        if readers:
            await asyncio.wait(readers, timeout=self._timing.last_words_s)

    async def close(self) -> None:
        """Ends the session on every stage."""
        await asyncio.gather(*(stream.close() for stream in self._streams))
