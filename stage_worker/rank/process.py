"""A rank process: forked by its worker's zygote, or `python -m stagemesh.stage_worker.rank.process CONFIG` of its own.

It opens its transports, measures its device, says READY, and then obeys: Assign, OfferLink, ConnectLink, Activate,
Release and gateways' sessions, until the agent is gone.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import torch
from google.protobuf.message import DecodeError

from stagemesh import process
from stagemesh.errors import InvalidRequest, NotFound, StagemeshError, StaleEpoch, TransportError
from stagemesh.faults import point
from stagemesh.protos.v1 import stage_pb2
from stagemesh.transport.base import Transport
from stagemesh.transport.select import open_transport

from ..messages.control import Kind, Socket, dumps, pack_error
from ..messages.heartbeat import Heart
from ..messages.rank_config import RankConfig
from ..messages.shared_memory import path_of
from ..model.choose import Shard, preload
from ..model.parallel import TensorParallel
from ..model.spec import ShardSpec
from .assignment import Assignment
from .engine import Engine
from .link_commands import LinkCommands
from .measure import measure
from .order import OrderReceiver, OrderSender
from .preparing import Preparing
from .rank_memory import RankMemory
from .resources import StageResources, page_share
from .session import Session

log = logging.getLogger(__name__)

ENDS = "this rank ends, and with it its group"
"""What is logged with an error that ends it."""
PROGRESS_S = 0.05
"""Between two messages of the progress of a load."""


class Rank:
    """Commands of the agent, carried out on the engine's thread."""

    def __init__(self, config: RankConfig, engine: Engine, device: torch.device, parallel: TensorParallel) -> None:
        self.config = config
        self.engine = engine
        self._memory = RankMemory(config, engine, device, parallel)
        self._preparing = Preparing(self._memory, self._tell_progress, self._prepared)
        links = LinkCommands(config, engine, device, self._assignment)
        self._sessions: dict[int, Assignment] = {}
        self._told_at = 0.0
        self._calls: dict[Kind, Callable[[int, bytes], bytes | None]] = {
            Kind.ASSIGN: self.assign,
            Kind.OFFER_LINK: links.offer,
            Kind.CONNECT_LINK: links.connect,
            Kind.ACTIVATE: self.activate,
            Kind.RELEASE: self.release,
            Kind.OPEN_SESSION: self.open_session,
            Kind.CLOSE_SESSION: self.close_session,
            Kind.PREPARE: self.prepare,
        }
        engine.handle = self.handle
        engine.background = lambda: self._preparing.poll() | links.poll()

    def handle(self, kind: Kind, ident: int, payload: bytes) -> None:
        """One frame of the agent. A call is answered by REPLY or ERROR; a message of a session by results."""
        if kind == Kind.RUN:
            self.run_message(ident, payload)
        elif kind == Kind.SHUTDOWN:
            self.engine.stopping = True
        else:
            self.engine.heart.call()
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
        self.engine.control.send_packed(pack_error(ident, error))

    # -- assignments ------------------------------------------------------------------------------------------------

    def assign(self, ident: int, payload: bytes) -> bytes:
        """Loads the range (or keeps it, when it is the one in memory) and allocates KV pages."""
        point("rank.assign")
        request = stage_pb2.AssignRequest.FromString(payload)
        if not request.beside:
            self._close(request.key.pipeline_id, request.key.epoch)
        # Of orders that were called off while they were carried out.
        for key, before in list(self.engine.assignments.items()):
            if before.pipeline_id == request.key.pipeline_id and not before.active:
                before.close()
                del self.engine.assignments[key]
        resources = self._memory.find(request)
        if resources is None:
            # Not before: what is in memory already need not wait for what is being loaded beside it.
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
        return _done(resources, request).SerializeToString()

    def prepare(self, ident: int, payload: bytes) -> bytes | None:
        """Loads a range and allocates its pages, for an assignment that may come; answers when that is done."""
        request = stage_pb2.PrepareRequest.FromString(payload)
        if not request.beside:
            # What is left is of an order that was called off while it was carried out.
            for before in self.engine.assignments.values():
                before.close()
            self.engine.assignments.clear()
        resources = self._memory.find(request)
        if resources is None:
            self._preparing.start(ident, request, serves=bool(self.engine.assignments))
            return None
        return _done(resources, request).SerializeToString()

    def _prepared(self, ident: int, request: stage_pb2.PrepareRequest, outcome: list[Shard] | BaseException) -> None:
        """The weights are in memory."""
        if not isinstance(outcome, BaseException):
            try:
                resources = self._memory.make(request, outcome)
            except (StagemeshError, RuntimeError, MemoryError) as e:
                outcome = e
            else:
                first, last = request.layers.first, request.layers.last - 1
                if not self.engine.assignments:
                    self._stands_by(first, last)
                log.info("layers %d-%d are loaded, and wait for an assignment", first, last)
                self.engine.control.send(Kind.REPLY, ident, _done(resources, request).SerializeToString())
                return
        self._failed(Kind.PREPARE, ident, outcome)

    def _stands_by(self, first: int, last: int) -> None:
        process.set_title(f"standby layers {first}-{last} rank {self.config.rank}")

    def _tell_progress(self, ident: int, done: int, total: int) -> None:
        self.engine.heart.call()
        now = time.monotonic()
        if now - self._told_at > PROGRESS_S or done == total:
            self._told_at = now
            progress = stage_pb2.AssignResponse(loaded_bytes=done, total_bytes=total)
            self.engine.control.send(Kind.PROGRESS, ident, progress.SerializeToString())

    def activate(self, ident: int, payload: bytes) -> bytes:
        """Starts taking sessions."""
        point("rank.activate")
        request = stage_pb2.ActivateRequest.FromString(payload)
        self._assignment(request.key, request.stage).active = True
        return stage_pb2.ActivateResponse().SerializeToString()

    def release(self, ident: int, payload: bytes) -> bytes:
        """Ends an assignment; the weights stay in memory for the next one that wants them."""
        request = stage_pb2.ReleaseRequest.FromString(payload)
        self._close(request.key.pipeline_id, request.key.epoch, request.key.epoch if request.alone else 0)
        self._memory.trim()
        return stage_pb2.ReleaseResponse().SerializeToString()

    def _close(self, pipeline_id: str, until: int, since: int = 0) -> None:
        """What is assigned of a pipeline at epochs `since` to `until` is over."""
        for key, assignment in list(self.engine.assignments.items()):
            if assignment.pipeline_id == pipeline_id and since <= assignment.epoch <= until:
                assignment.close()
                del self.engine.assignments[key]
                if not self.engine.assignments:
                    # Its weights stay in memory.
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

    def open_session(self, ident: int, payload: bytes) -> bytes:
        """Opens a gateway's session; the payload is the gateway's RunOpen, the id names the session from now on."""
        point("rank.open_session")
        request = stage_pb2.RunOpen.FromString(payload)
        assignment = self._assignment(request.key, request.stage)
        opened = assignment.open_session(ident, request)
        self._sessions[ident] = assignment
        return opened.SerializeToString()

    def close_session(self, ident: int, payload: bytes) -> bytes:
        """Closes the session that the payload's number names."""
        session = int.from_bytes(payload, "little")
        assignment = self._sessions.pop(session, None)
        if assignment is not None:
            assignment.close_session(session)
        return b""

    def run_message(self, ident: int, payload: bytes) -> None:
        """A gateway's message within a session; a wrong one ends the session, never the rank."""
        assignment = self._sessions.get(ident)
        session: Session | None = assignment.sessions.get(ident) if assignment is not None else None
        if assignment is None or session is None:
            return  # It was closed while this message was under way; the gateway has been told.
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


def open_transports(config: RankConfig) -> dict[str, Transport]:
    """Opens what the settings ask for; `auto` opens UCX, where it can, and TCP."""
    options = {"TLS": config.ucx_tls, "NET_DEVICES": config.net_device}
    wanted = ["ucx", "tcp"] if config.transport == "auto" else [config.transport]
    opened: dict[str, Transport] = {}
    for name in wanted:
        try:
            opened[name] = open_transport(
                name,
                host=config.host,
                advertise=config.advertise_host,
                device=config.device,
                ucx_options={key: value for key, value in options.items() if value},
            )
        except TransportError as e:
            if config.transport != "auto":
                raise
            log.warning("links will be made over TCP: UCX is not to be had here: %s", e.message)
    return opened


def import_all(config: RankConfig) -> None:
    """Imports what is slow to import and known to be needed before an assignment."""
    device = "cuda" if config.device == "cuda" else "cpu"
    preload(ShardSpec(config.model or "", 0, 1, device=device, tp_size=config.size, enforce_eager=config.enforce_eager))


def run(config: RankConfig) -> int:
    """Runs the rank until the agent is gone; the exit status."""
    process.set_title(f"{config.label} rank {config.rank}")
    process.die_with_parent(config.parent_pid)
    process.set_up_logging(f"{config.label} rank {config.rank}")
    # Ctrl-C goes to the whole terminal group; it is the agent that decides when a rank ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if config.cpus:
        os.sched_setaffinity(0, config.cpus)
    torch.set_num_threads(config.compute_threads)
    control = Socket(socket.socket(fileno=config.control_fd))
    order = [socket.socket(fileno=fd) for fd in config.order_fds]
    device = torch.device(f"cuda:{config.rank}" if config.device == "cuda" else "cpu")
    import_all(config)
    # What is imported by now stays: a later collection looks at nothing but what came behind it.
    gc.freeze()
    parallel = TensorParallel(
        config.rank,
        config.size,
        store_path=None if config.store_fd is None else path_of(config.store_fd),
        exchange_fd=config.exchange_fd,
        device=str(device),
    )
    try:
        transports = open_transports(config)
        engine = Engine(
            control,
            transports,
            OrderSender(order) if config.size > 1 and config.rank == 0 else None,
            OrderReceiver(order[0]) if config.rank > 0 else None,
            Heart(config.heart_fd, config.rank, config.size, cuda=device.type == "cuda"),
        )
        Rank(config, engine, device, parallel)
        info = measure(device)
    except StagemeshError as e:
        control.send_packed(pack_error(0, e))
        return 1
    addresses = {name: transport.address().hex() for name, transport in transports.items()}
    control.send(Kind.READY, 0, dumps({"device": info.SerializeToString().hex(), "addresses": addresses}))
    engine.run()
    for assignment in engine.assignments.values():
        assignment.close()
    for transport in transports.values():
        transport.close()
    parallel.close()
    return 0


if __name__ == "__main__":
    process.run_and_exit(lambda: run(RankConfig.from_json(sys.argv[1])), ENDS)
