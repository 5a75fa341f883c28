"""Carries out the agent's orders, on the engine's thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError, Message

from stagemesh import process
from stagemesh.errors import InvalidRequest, NotFound, StagemeshError, StaleEpoch
from stagemesh.faults import point
from stagemesh.processes.frames import parse
from stagemesh.protos.v1 import stage_pb2, worker_pb2

from ..messages.control import Kind, failure_of
from ..messages.rank_config import RankConfig
from ..model.choose import Shard
from ..model.parallel import TensorParallel
from ..timing import StageTiming
from .assignment import Assignment
from .engine import Engine
from .link_commands import LinkCommands
from .memory.preparing import Preparing
from .memory.rank_memory import RankMemory
from .memory.resources import StageResources, page_share
from .session import Session

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
Call = Callable[[int, bytes], Message | None]


def _call(request: type[M], carry_out: Callable[[int, M], Message | None]) -> Call:
    """Makes a handler of (id, payload). It returns the reply, or None if the reply comes later."""
    return lambda ident, payload: carry_out(ident, parse(request, payload))


class RankCommands:
    """Handlers of Assign, Prepare, OfferLink, ConnectLink, Activate and Release, and of gateways' sessions."""

    def __init__(
        self, config: RankConfig, engine: Engine, device: torch.device, parallel: TensorParallel, timing: StageTiming
    ) -> None:
        self.config = config
        self.engine = engine
        self.timing = timing
        self._memory = RankMemory(config, engine, device, parallel)
        self._preparing = Preparing(self._memory, self._tell_progress, self._prepared, timing.load_sign_s)
        links = LinkCommands(config, engine, device, self._assignment, timing.link_s)
        self._sessions: dict[int, Assignment] = {}
        self._told_at = 0.0
        self._calls: dict[Kind, Call] = {
            Kind.ASSIGN: _call(stage_pb2.AssignRequest, self.assign),
            Kind.OFFER_LINK: _call(stage_pb2.OfferLinkRequest, links.offer),
            Kind.CONNECT_LINK: _call(stage_pb2.ConnectLinkRequest, links.connect),
            Kind.ACTIVATE: _call(stage_pb2.ActivateRequest, self.activate),
            Kind.RELEASE: _call(stage_pb2.ReleaseRequest, self.release),
            Kind.OPEN_SESSION: _call(stage_pb2.RunOpen, self.open_session),
            Kind.CLOSE_SESSION: _call(worker_pb2.CloseSession, self.close_session),
            Kind.PREPARE: _call(stage_pb2.PrepareRequest, self.prepare),
        }
        engine.handle = self.handle
        engine.background = lambda: self._preparing.poll() | links.poll()

    def handle(self, kind: Kind, ident: int, payload: bytes) -> None:
        """Handles one frame from the agent. Answers a call with REPLY or ERROR."""
        if kind == Kind.RUN:
            self.run_message(ident, payload)
        elif kind == Kind.SHUTDOWN:
            self.engine.stopping = True
        else:
            self.engine.heartbeat.order(kind)
            try:
                reply = self._calls[kind](ident, payload)
            except (StagemeshError, RuntimeError, OSError, ValueError, MemoryError) as e:
                self._failed(kind, ident, e)
            else:
                if reply is not None:
                    self.engine.control.send(Kind.REPLY, ident, reply)

    def _failed(self, kind: Kind, ident: int, error: BaseException) -> None:
        if not isinstance(error, StagemeshError):
            log.error("%s failed", kind.name, exc_info=error)
        self.engine.control.send(Kind.ERROR, ident, failure_of(error))

    # -- assignments ------------------------------------------------------------------------------------------------

    def assign(self, ident: int, request: stage_pb2.AssignRequest) -> stage_pb2.AssignDone:
        """Loads the layer range and allocates KV pages, unless they are already in memory."""
        point("rank.assign")
        if not request.beside:
            self._close(request.key.pipeline_id, request.key.epoch)
        # These assignments were cancelled while they were carried out.
        for key, before in list(self.engine.assignments.items()):
            if before.pipeline_id == request.key.pipeline_id and not before.active:
                before.close()
                del self.engine.assignments[key]
        resources = self._memory.find(request)
        if resources is None:
            # Layers that are in memory need not wait for a load under way, so this comes only now.
            self._preparing.join()
            resources = self._memory.hold(request, lambda done, total: self._tell_progress(ident, done, total))
        pool = resources.pool
        assignment = Assignment(request, resources, self.config.rank)
        self.engine.assignments[request.key.pipeline_id, request.key.epoch] = assignment
        self._memory.trim()
        layers = f"layers {request.layers.first}-{request.layers.last - 1}"
        process.set_title(f"stage {request.stage} {layers} rank {self.config.rank}")
        tokens = pool.num_pages * pool.page_size
        log.info(
            "stage %d, %s: %d KV pages of %d tokens = %d tokens, %.1f requests of %d tokens at once",
            request.stage, layers, pool.num_pages, pool.page_size, tokens,
            tokens / request.limits.max_model_len, request.limits.max_model_len,
        )  # fmt: skip
        return _done(resources, request)

    def prepare(self, ident: int, request: stage_pb2.PrepareRequest) -> stage_pb2.AssignDone | None:
        """Loads a range and allocates its pages for an assignment that may come later. Replies after the load."""
        if not request.beside:
            # These assignments were cancelled while they were carried out.
            for before in self.engine.assignments.values():
                before.close()
            self.engine.assignments.clear()
        resources = self._memory.find(request)
        if resources is None:
            self._preparing.start(ident, request, serves=bool(self.engine.assignments))
            self.engine.heartbeat.loads = True
            return None
        return _done(resources, request)

    def _prepared(self, ident: int, request: stage_pb2.PrepareRequest, loaded: Future[list[Shard]]) -> None:
        """Allocates the pages after a load has ended. Answers the call."""
        self.engine.heartbeat.loads = False
        self.engine.heartbeat.load()
        try:
            resources = self._memory.make(request, loaded.result())
        except Exception as e:  # noqa: BLE001 - told to the agent
            self._failed(Kind.PREPARE, ident, e)
            return
        first, last = request.layers.first, request.layers.last - 1
        if not self.engine.assignments:
            self._stands_by(first, last)
        log.info("layers %d-%d are loaded for a later assignment", first, last)
        self.engine.control.send(Kind.REPLY, ident, _done(resources, request))

    def _stands_by(self, first: int, last: int) -> None:
        process.set_title(f"standby layers {first}-{last} rank {self.config.rank}")

    def _tell_progress(self, ident: int, done: int, total: int) -> None:
        self.engine.heartbeat.load()
        now = time.monotonic()
        if now - self._told_at > self.timing.progress_s or done == total:
            self._told_at = now
            progress = stage_pb2.AssignResponse(loaded_bytes=done, total_bytes=total)
            self.engine.control.send(Kind.PROGRESS, ident, progress)

    def activate(self, ident: int, request: stage_pb2.ActivateRequest) -> stage_pb2.ActivateResponse:
        """Allows sessions on an assignment."""
        point("rank.activate")
        self._assignment(request.key, request.stage).active = True
        return stage_pb2.ActivateResponse()

    def release(self, ident: int, request: stage_pb2.ReleaseRequest) -> stage_pb2.ReleaseResponse:
        """Ends an assignment. The weights stay in memory for a later assignment."""
        self._close(request.key.pipeline_id, request.key.epoch, request.key.epoch if request.alone else 0)
        self._memory.trim()
        return stage_pb2.ReleaseResponse()

    def _close(self, pipeline_id: str, until: int, since: int = 0) -> None:
        """Ends assignments of a pipeline at epochs `since` to `until`."""
        for key, assignment in list(self.engine.assignments.items()):
            if assignment.pipeline_id == pipeline_id and since <= assignment.epoch <= until:
                assignment.close()
                del self.engine.assignments[key]
                if not self.engine.assignments:
                    # The weights stay in memory, and the process title says so.
                    layers = assignment.shard.kv_layers
                    self._stands_by(layers[0].layer_idx, layers[-1].layer_idx)

    def _assignment(self, key: stage_pb2.PipelineKey, stage: int) -> Assignment:
        assignment = self.engine.assignments.get((key.pipeline_id, key.epoch))
        if assignment is not None and assignment.stage == stage:
            return assignment
        others = [str(epoch) for name, epoch in self.engine.assignments if name == key.pipeline_id]
        if not others or assignment is not None:
            raise NotFound(f"this worker does not hold stage {stage} of {key.pipeline_id}")
        raise StaleEpoch(f"{key.pipeline_id} is at epoch {', '.join(others)} here, not {key.epoch}")

    # -- sessions ---------------------------------------------------------------------------------------------------

    def open_session(self, ident: int, request: stage_pb2.RunOpen) -> stage_pb2.RunOpened:
        """Opens a gateway's session. The id of the call becomes the id of the session."""
        point("rank.open_session")
        assignment = self._assignment(request.key, request.stage)
        opened = assignment.open_session(ident, request)
        self._sessions[ident] = assignment
        return opened

    def close_session(self, ident: int, request: worker_pb2.CloseSession) -> worker_pb2.CloseSession:
        """Closes a session, if it is still open."""
        assignment = self._sessions.pop(request.session, None)
        if assignment is not None:
            assignment.close_session(request.session)
        return request

    def run_message(self, ident: int, payload: bytes) -> None:
        """Handles a gateway's message. An invalid message ends the session, never the rank."""
        assignment = self._sessions.get(ident)
        session: Session | None = assignment.sessions.get(ident) if assignment is not None else None
        if assignment is None or session is None:
            return  # The session was closed while this message was under way. The gateway knows that.
        if session.failed:
            return
        try:
            request = stage_pb2.RunRequest.FromString(payload)
            match request.WhichOneof("message"):
                case "plan":
                    assignment.add_plan(session, request.plan)
                case "open_sequence":
                    session.open_sequence(request.open_sequence)
                case "close_sequence":
                    session.close_sequence(request.close_sequence)
                case "copy":
                    assignment.copy_pages(session, request.copy)
        except StagemeshError as e:
            self.engine.end_session(session, e)
        except DecodeError as e:
            self.engine.end_session(session, InvalidRequest(f"a message of the session cannot be read: {e}"))


def _done(
    resources: StageResources, request: stage_pb2.AssignRequest | stage_pb2.PrepareRequest
) -> stage_pb2.AssignDone:
    return stage_pb2.AssignDone(
        num_pages=page_share(resources.pool.num_pages, request.limits),
        page_bytes=resources.page_bytes,
        weight_bytes=resources.weight_bytes,
        tensor_bytes_read=resources.shard.tensor_bytes_read,
        fingerprint=request.model.fingerprint,
        vocab_size=resources.shard.vocab_size,
        kv_layout=f"{resources.shard.kv_layout}, {resources.shard.dtype}, pages of {resources.pool.page_size}",
    )
