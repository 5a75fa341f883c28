"""The gateway's end of one worker's Run stream. It sends plans, serialized once for all stages, and takes results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol, cast

import grpc

from stagemesh import rpc
from stagemesh.errors import InternalError, RanksDied, StageLost, StagemeshError, Unavailable, by_reason
from stagemesh.protocol import spoken
from stagemesh.protos.v1 import stage_pb2, types_pb2

from ..timing import GatewayTiming
from .messages import page_bits
from .slot_lease import SlotLease

log = logging.getLogger(__name__)

METHOD = "/stagemesh.v1.Stage/Run"
OUTBOX_MESSAGES = 4096


class SessionEvents(Protocol):
    """Callbacks for what comes back."""

    def on_result(self, stage: int, result: stage_pb2.StepResult) -> None:
        """A stage is done with a step."""

    def on_copied(self, copied: stage_pb2.PagesCopied) -> None:
        """Pages of a copy have arrived at their worker."""

    def on_lost(self, error: StagemeshError) -> None:
        """A stream ended."""


class RunStream:
    """The stream to one stage of one pipeline."""

    def __init__(self, stage: types_pb2.StageView, heard_by: SessionEvents, timing: GatewayTiming) -> None:
        self._timing = timing
        self.stage = stage
        self._heard_by = heard_by
        self._channel = rpc.channel(stage.address)
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue(OUTBOX_MESSAGES)
        """Messages to send. None ends the stream: cancelling a call that is over would leave its sender waiting for
        ever."""
        self.reader: asyncio.Task[None] | None = None
        """Reads responses. It ends when the stream has ended."""
        self.unreachable = False
        """Whether the worker did not answer when the session was opened."""

    @property
    def who(self) -> str:
        """Name of the stage and its worker in error messages."""
        return f"stage {self.stage.stage} ({self.stage.worker_id})"

    async def open(
        self, view: types_pb2.PipelineView, slot: SlotLease, pages: Sequence[int] | None
    ) -> stage_pb2.RunOpened:
        """Opens the session of a pipeline's epoch. `pages`: ids to ask for; None: as many as allowed.

        Raises the worker's error, Unavailable when it cannot be reached, or StageLost.
        """
        call = self._channel.stream_stream(
            METHOD, request_serializer=None, response_deserializer=stage_pb2.RunResponse.FromString
        )(self._messages())
        responses = cast(AsyncGenerator[stage_pb2.RunResponse, None], call.__aiter__())
        opening = stage_pb2.RunOpen(
            key=stage_pb2.PipelineKey(pipeline_id=view.pipeline_id, epoch=view.epoch),
            stage=self.stage.stage,
            gateway_id=slot.gateway_id,
            life=slot.life,
            instance=slot.instance,
            slot=slot.slot,
            protocol=spoken(self.stage.protocol),
            pages=page_bits(pages or ()),
        )
        self.send(stage_pb2.RunRequest(open=opening).SerializeToString())
        try:
            with rpc.mapped():
                async with asyncio.timeout(self._timing.open_s):
                    first = await anext(responses)
        except Unavailable as e:
            # A worker that answers says when to try again.
            self.unreachable = e.retry_after_s is None
            raise
        except StopAsyncIteration as e:
            raise StageLost(f"{self.who} closed the stream at once") from e
        except TimeoutError as e:
            call.cancel()
            raise StageLost(f"{self.who} did not open a session within {self._timing.open_s:.0f} s") from e
        if first.WhichOneof("message") == "ended":
            raise by_reason(first.ended.reason)(first.ended.message)
        self.reader = asyncio.create_task(self._read(call, responses))
        opened: stage_pb2.RunOpened = first.opened
        return opened

    def send(self, message: bytes) -> None:
        """Queues a message. The queue is bounded: a worker that does not read counts as lost."""
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            self._heard_by.on_lost(StageLost(f"{self.who} left {OUTBOX_MESSAGES} messages unread"))

    async def _messages(self) -> AsyncIterator[bytes]:
        while (message := await self._outbox.get()) is not None:
            yield message

    async def _read(
        self,
        call: grpc.aio.StreamStreamCall[bytes, stage_pb2.RunResponse],
        responses: AsyncGenerator[stage_pb2.RunResponse, None],
    ) -> None:
        try:
            with rpc.mapped():
                async for response in responses:
                    kind = response.WhichOneof("message")
                    if kind == "results":
                        for result in response.results.results:
                            self._heard_by.on_result(self.stage.stage, result)
                    elif kind == "copied":
                        self._heard_by.on_copied(response.copied)
                    elif kind == "ended":
                        ended = response.ended
                        raise (RanksDied if ended.ranks_died else StageLost)(f"{self.who}: {ended.message}")
            raise StageLost(f"{self.who} closed the stream")
        except StagemeshError as e:
            # A new error is made, because the traceback of `e` keeps this frame alive, and with it the connection.
            self._heard_by.on_lost(
                type(e)(e.message) if isinstance(e, StageLost) else StageLost(f"{self.who} is gone: {e.message}")
            )
        except Exception as e:
            log.exception("handling a result of %s failed", self.who)
            self._heard_by.on_lost(InternalError(f"{type(e).__name__}: {e}"))
        finally:
            call.cancel()
            # The call and the generator of its responses reference each other, and keep the connection alive.
            await responses.aclose()

    async def close(self) -> None:
        """Ends the stream, and drops messages that were not sent. The worker then frees the session's pages."""
        while not self._outbox.empty():
            self._outbox.get_nowait()
        self._outbox.put_nowait(None)
        if self.reader is not None:
            # A call that ends by itself frees its connection. A cancelled one keeps it until garbage collection.
            await asyncio.wait([self.reader], timeout=self._timing.end_s)
            self.reader.cancel()
            await asyncio.gather(self.reader, return_exceptions=True)
        await self._channel.close(None)
