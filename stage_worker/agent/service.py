"""The Stage service of a worker. It runs in the agent process, so that compute in the ranks never delays a lease.

The agent keeps the coordinator's assignments and the gateways' sessions. The ranks do the work. The agent forwards
plans and results as bytes, unparsed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import operator
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from stagemesh.errors import InvalidRequest, NotFound, RanksDied, StageLost, StagemeshError, StaleEpoch, Unavailable
from stagemesh.faults import point
from stagemesh.processes.frames import parse
from stagemesh.protocol import check_protocol
from stagemesh.protos.v1 import coordinator_pb2, stage_pb2, stage_pb2_grpc, worker_pb2
from stagemesh.settings.stage import StageSettings

from ..messages.control import Kind, error_of
from ..timing import StageTiming
from .files import CheckpointFiles
from .gateway_session import GatewaySession
from .rank_group import RankGroup

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
SERVICE_NAME: str = stage_pb2.DESCRIPTOR.services_by_name["Stage"].full_name


@dataclass
class AssignedStage:
    """A stage that the coordinator assigned to this worker at one epoch."""

    request: stage_pb2.AssignRequest
    done: stage_pb2.AssignDone | None = None
    active: bool = False


class Agent(stage_pb2_grpc.StageServicer):
    """State of one worker, and the handlers of its Stage service."""

    def __init__(self, settings: StageSettings, worker_id: str, timing: StageTiming, files: CheckpointFiles) -> None:
        self.settings = settings
        self._files = files
        self.timing = timing
        self.worker_id = worker_id
        self.ranks: RankGroup | None = None
        self.assigned: dict[tuple[str, int], AssignedStage] = {}
        """Assignments by (pipeline, epoch). While a pipeline moves, it has one at each of two epochs."""
        self.epochs: dict[str, int] = {}
        """Pipeline -> highest epoch seen. The agent refuses orders of older epochs."""
        self.sessions: dict[int, GatewaySession] = {}
        self.stale_refused: Counter[str] = Counter()
        self.broken: dict[tuple[str, int], str] = {}
        """(pipeline, epoch) -> why a link of this worker broke. Renewals of the lease report it to the coordinator."""
        self._closing: set[asyncio.Task[None]] = set()
        self.progress: dict[int, dict[int, stage_pb2.AssignResponse]] = {}
        """Call -> rank -> the latest progress of a load."""

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Adds the Stage service to a server. Run handles raw bytes: the agent does not parse plans and results."""
        stage_pb2_grpc.add_StageServicer_to_server(self, server)
        run = grpc.stream_stream_rpc_method_handler(self.Run)
        server.add_registered_method_handlers(SERVICE_NAME, {"Run": run})  # type: ignore[attr-defined]

    # -- ranks ------------------------------------------------------------------------------------------------------

    def on_frame(self, rank: int, kind: Kind, ident: int, payload: bytes) -> None:
        """Handles a frame from a rank that is not the answer to a call."""
        if kind == Kind.RESULT:
            if (session := self.sessions.get(ident)) is not None:
                session.put(payload)
        elif kind == Kind.SESSION_ENDED:
            session, error = self.sessions.get(ident), error_of(parse(worker_pb2.Failure, payload))
            if isinstance(error, StaleEpoch):
                self.stale_refused["plan"] += 1
            if session is not None:
                session.put(error)
        elif kind == Kind.PROGRESS:
            if ident in self.progress:  # Otherwise the call was cancelled.
                self.progress[ident][rank] = parse(stage_pb2.AssignResponse, payload)
        elif kind == Kind.PAGES_COPIED:
            if (session := self.sessions.get(ident)) is not None:
                session.copied_on(rank, payload)
        elif kind == Kind.LATE_FRAMES:
            self.stale_refused["frame"] += parse(worker_pb2.LateFrames, payload).count
        elif kind == Kind.LINK_BROKEN:
            said = parse(worker_pb2.LinkBroken, payload)
            self.broken[said.pipeline_id, said.epoch] = said.reason
            self._end_sessions(said.pipeline_id, said.epoch, f"a link broke: {said.reason}", said.epoch)
            log.warning("link of %s broke: %s", said.pipeline_id, said.reason)
        else:
            log.error("rank %d sent %s, which is not for its agent", rank, kind.name)

    def ranks_lost(self, reason: str) -> None:
        """Drops all assignments and ends all sessions, because the rank group died."""
        self.assigned.clear()
        for session in self.sessions.values():
            session.put(RanksDied(f"{self.worker_id}: {reason}"))

    def _end_sessions(self, pipeline_id: str, epoch: int, reason: str, since: int = 0) -> None:
        """Ends the streams of sessions at epochs `since` to `epoch`. The end of a stream closes its session."""
        for session in self.sessions.values():
            if session.open.key.pipeline_id == pipeline_id and since <= session.open.key.epoch <= epoch:
                session.put(StageLost(reason))

    def _group(self) -> RankGroup:
        if self.ranks is None or not self.ranks.up or self.ranks.lost.done():
            raise Unavailable(f"the ranks of {self.worker_id} are being started", retry_after_s=1)
        return self.ranks

    # -- assignments ------------------------------------------------------------------------------------------------

    async def Assign(self, request: stage_pb2.AssignRequest, context: Any) -> AsyncIterator[stage_pb2.AssignResponse]:
        """Handles Stage.Assign."""
        point("agent.assign")
        self._fence(request.key, "assignment")
        self._group()
        key = _key(request.key)
        if not request.beside:
            self._drop(request.key, request.key.epoch - 1, f"epoch {request.key.epoch} begins")
        assigned = self.assigned[key] = AssignedStage(request)
        try:
            async for response in self._load(Kind.ASSIGN, request):
                if response.HasField("done"):
                    assigned.done = response.done
                yield response
        except BaseException:
            # The coordinator cancels the call once it has received `done`. That is not a failure.
            if assigned.done is None and self.assigned.get(key) is assigned:
                del self.assigned[key]
            raise

    def _drop(self, key: stage_pb2.PipelineKey, until: int, reason: str, since: int = 0) -> None:
        """Forgets assignments of a pipeline at epochs `since` to `until`, and ends their sessions."""
        for k in [k for k in self.assigned if k[0] == key.pipeline_id and since <= k[1] <= until]:
            del self.assigned[k]
        self._end_sessions(key.pipeline_id, until, reason, since)

    async def Prepare(self, request: stage_pb2.PrepareRequest, context: Any) -> AsyncIterator[stage_pb2.AssignResponse]:
        """Handles Stage.Prepare."""
        point("agent.prepare")
        async for response in self._load(Kind.PREPARE, request):
            yield response

    async def _load(
        self, kind: Kind, request: stage_pb2.AssignRequest | stage_pb2.PrepareRequest
    ) -> AsyncIterator[stage_pb2.AssignResponse]:
        """Orders the ranks to load layers. Yields progress, and at the end the combined answer of all ranks."""
        fetched = stage_pb2.AssignResponse(fetching=True)

        def tell(here: int, total: int) -> None:
            fetched.loaded_bytes, fetched.total_bytes = here, total

        finding = asyncio.create_task(self._files.find(request, tell))
        async for response in self._while(finding, lambda: fetched if fetched.total_bytes else None):
            yield response
        stamps = finding.result()
        group = self._group()
        if isinstance(request, stage_pb2.PrepareRequest):
            # This is decided now: an assignment may have arrived since the coordinator asked.
            request.beside = bool(self.assigned)
        ident = group.take_id()
        progress = self.progress[ident] = {}
        loading = group.call_as(ident, kind, self._files.order(request), stage_pb2.AssignDone, self.timing.assign_s)
        call = asyncio.create_task(loading)
        try:
            async for response in self._while(call, lambda: _sum_of(progress.values())):
                yield response
            ranks = call.result()
        finally:
            del self.progress[ident]
        await self._files.check_unchanged(stamps)
        done = ranks[0]
        done.fingerprint = request.model.fingerprint
        done.num_pages = min(rank.num_pages for rank in ranks)
        done.tensor_bytes_read = sum(rank.tensor_bytes_read for rank in ranks)
        yield stage_pb2.AssignResponse(done=done)

    async def _while(
        self, task: asyncio.Task[Any], progress: Callable[[], stage_pb2.AssignResponse | None]
    ) -> AsyncIterator[stage_pb2.AssignResponse]:
        """Yields progress now and then until the task ends. Cancels the task if the coordinator hangs up."""
        try:
            while not task.done():
                await asyncio.wait([task], timeout=self.timing.progress_look_s)
                said = progress()
                if said is not None:
                    yield said
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def OfferLink(self, request: stage_pb2.OfferLinkRequest, context: Any) -> stage_pb2.OfferLinkResponse:
        """Handles Stage.OfferLink."""
        self._fence(request.key, "link")
        ranks = 1 if request.tokens else self._group().size
        if len(request.nonces) != ranks:
            raise InvalidRequest(f"{len(request.nonces)} nonces for {ranks} ranks")
        offers = await self._call(Kind.OFFER_LINK, request, stage_pb2.OfferLinkResponse)
        return stage_pb2.OfferLinkResponse(
            receiver_addresses=[offer.receiver_addresses[0] for offer in offers[:ranks]],
            secrets=[offer.secrets[0] for offer in offers[:ranks]],
        )

    async def ConnectLink(self, request: stage_pb2.ConnectLinkRequest, context: Any) -> stage_pb2.ConnectLinkResponse:
        """Handles Stage.ConnectLink."""
        self._fence(request.key, "link")
        routes = {reply.route for reply in await self._call(Kind.CONNECT_LINK, request, stage_pb2.ConnectLinkResponse)}
        return stage_pb2.ConnectLinkResponse(route=", ".join(sorted(routes - {""})))

    async def Activate(self, request: stage_pb2.ActivateRequest, context: Any) -> stage_pb2.ActivateResponse:
        """Handles Stage.Activate."""
        self._fence(request.key, "activation")
        await self._call(Kind.ACTIVATE, request, stage_pb2.ActivateResponse)
        assigned = self.assigned.get(_key(request.key))
        if assigned is None:
            raise StaleEpoch(f"{request.key.pipeline_id} epoch {request.key.epoch} is no longer assigned here")
        assigned.active = True
        return stage_pb2.ActivateResponse()

    async def Release(self, request: stage_pb2.ReleaseRequest, context: Any) -> stage_pb2.ReleaseResponse:
        """Handles Stage.Release."""
        point("agent.release")
        key = request.key
        since = key.epoch if request.alone else 0
        self._drop(key, key.epoch, request.reason or "the pipeline is being changed", since)
        # Ranks may still hold an assignment whose call was cancelled.
        await self._call(Kind.RELEASE, request, stage_pb2.ReleaseResponse)
        return stage_pb2.ReleaseResponse()

    async def _call(self, kind: Kind, request: Message, reply: type[M]) -> list[M]:
        """Calls the ranks with the deadline of an order that loads nothing."""
        return await self._group().call(kind, request, reply, self.timing.call_s)

    def _fence(self, key: stage_pb2.PipelineKey, kind: str) -> None:
        """Raises StaleEpoch for an order of an earlier epoch, and counts it."""
        known = self.epochs.get(key.pipeline_id, 0)
        if key.epoch < known:
            self.stale_refused[kind] += 1
            raise StaleEpoch(f"{kind} of {key.pipeline_id} at epoch {key.epoch}; {self.worker_id} has seen {known}")
        self.epochs[key.pipeline_id] = key.epoch

    # -- sessions ---------------------------------------------------------------------------------------------------

    async def Run(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Handles Stage.Run on raw bytes: the agent parses only the first message."""
        first = await anext(requests, None)
        if first is None:
            return
        message = stage_pb2.RunRequest.FromString(first)
        if message.WhichOneof("message") != "open":
            raise InvalidRequest("the first message of Run must be `open`")
        session, opened = await self._open(message.open)
        pump = asyncio.create_task(self._pump(session, requests))
        # A `finally` would not do: gRPC never resumes a handler that it cancels during a write.
        context.add_done_callback(lambda _: self._close_soon(session, pump))
        yield stage_pb2.RunResponse(opened=opened).SerializeToString()
        async for response in session.responses():
            yield response

    async def _open(self, request: stage_pb2.RunOpen) -> tuple[GatewaySession, stage_pb2.RunOpened]:
        point("agent.open_session")
        check_protocol(request.protocol, f"gateway {request.gateway_id}")
        assigned = self.assigned.get(_key(request.key))
        known = self.epochs.get(request.key.pipeline_id, 0)
        if assigned is None and request.key.epoch < known:
            self.stale_refused["session"] += 1
            raise StaleEpoch(f"{request.key.pipeline_id} is at epoch {known} here, not {request.key.epoch}")
        if assigned is None or not assigned.active:
            raise Unavailable(f"{request.key.pipeline_id} is not active here yet; try again", retry_after_s=0.2)
        if assigned.request.stage != request.stage:
            raise NotFound(f"{self.worker_id} holds stage {assigned.request.stage}, not {request.stage}")
        # A restarted gateway takes over its own pages at once. Steps that its previous process planned never run.
        for old in [s for s in self.sessions.values() if s.open.gateway_id == request.gateway_id]:
            if old.open.key == request.key or old.open.life != request.life:
                await self.close_session(old)
        group = self._group()
        session = GatewaySession(group.take_id(), request, group)
        self.sessions[session.ident] = session
        try:
            opened = await group.call_as(
                session.ident, Kind.OPEN_SESSION, request, stage_pb2.RunOpened, self.timing.call_s
            )
        except BaseException:
            # A rank may have opened the session, or may still open it. The close is queued after that.
            self._close_soon(session, None)
            raise
        return session, _together(opened)

    async def _pump(self, session: GatewaySession, requests: AsyncIterator[bytes]) -> None:
        reason = "the gateway closed its stream"
        try:
            async for message in requests:
                await session.group.run(session.ident, message)
        except StagemeshError as e:
            reason = e.message
        except grpc.aio.BaseError:
            reason = "the gateway went away"
        except Exception as e:
            log.exception("messages of gateway %s cannot be passed on", session.open.gateway_id)
            reason = f"messages cannot be passed on: {e}"
        session.put(StageLost(reason))

    def _close_soon(self, session: GatewaySession, pump: asyncio.Task[None] | None) -> None:
        """Closes a session from a callback, which cannot await."""

        async def close() -> None:
            if pump is not None:
                pump.cancel()
                await asyncio.gather(pump, return_exceptions=True)
            await self.close_session(session)

        task = asyncio.create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close_session(self, session: GatewaySession) -> None:
        if self.sessions.get(session.ident) is not session:
            return
        del self.sessions[session.ident]
        session.put(StageLost("the session was closed"))
        if not session.group.lost.done():
            try:
                request = worker_pb2.CloseSession(session=session.ident)
                await session.group.call(Kind.CLOSE_SESSION, request, worker_pb2.CloseSession, self.timing.call_s)
            except StagemeshError as e:
                log.warning("closing a session of %s: %s", session.open.gateway_id, e.message)

    # -- registration -----------------------------------------------------------------------------------------------

    def held_assignments(self) -> list[coordinator_pb2.HeldAssignment]:
        """The assignments that this worker holds, for a coordinator that may have lost its state."""
        return [
            coordinator_pb2.HeldAssignment(
                pipeline_id=assigned.request.key.pipeline_id,
                epoch=assigned.request.key.epoch,
                stage=assigned.request.stage,
                layers=assigned.request.layers,
                generation=assigned.request.generation,
                active=assigned.active,
                fingerprint=assigned.request.model.fingerprint,
            )
            for assigned in self.assigned.values()
            if assigned.done is not None
        ]


def _key(key: stage_pb2.PipelineKey) -> tuple[str, int]:
    return key.pipeline_id, key.epoch


def _sum_of(ranks: Collection[stage_pb2.AssignResponse]) -> stage_pb2.AssignResponse | None:
    """The progress of all ranks together; None before one has reported any."""
    if not ranks:
        return None
    return stage_pb2.AssignResponse(
        loaded_bytes=sum(rank.loaded_bytes for rank in ranks), total_bytes=sum(rank.total_bytes for rank in ranks)
    )


def _together(ranks: list[stage_pb2.RunOpened]) -> stage_pb2.RunOpened:
    """Combines the ranks' answers about a session. A page counts as in the journal if all ranks have it."""
    opened = ranks[0]
    opened.copy_pages = min(r.copy_pages for r in ranks)
    opened.kv_generation = functools.reduce(operator.xor, (r.kv_generation for r in ranks))
    opened.journal = bytes(
        functools.reduce(operator.and_, bits) for bits in zip(*(r.journal for r in ranks), strict=False)
    )
    return opened
