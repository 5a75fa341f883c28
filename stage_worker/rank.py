"""A rank process: `python -m stagemesh.stage_worker.rank CONFIG`, started by its worker's agent.

It opens its transports, measures its device, says READY, and then obeys: Assign, OfferLink, ConnectLink, Activate,
Release and gateways' sessions, until the agent is gone.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from stagemesh import process
from stagemesh.errors import ConfigError, InvalidRequest, NotFound, StagemeshError, StaleEpoch, TransportError
from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.transport.base import Transport
from stagemesh.transport.select import open_transport

from .assignment import Assignment
from .config import RankConfig
from .control import Kind, Socket, dumps, pack_error
from .engine import Engine
from .kv import KvPool
from .links import LinkIdentity, LinkReceiver, LinkSender, sending_rank
from .measure import available_memory_bytes, measure
from .order import Follower, Leader
from .parallel import TensorParallel
from .session import Session
from .shard.choose import Shard, load_shard, preload
from .shard.spec import ShardSpec

log = logging.getLogger(__name__)

CPU_KV_SHARE = 0.25
LINK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class _Loaded:
    """The shard in memory and what it was loaded as; kept over epochs that want the same."""

    spec: ShardSpec
    fingerprint: str
    shard: Shard


class Rank:
    """Commands of the agent, carried out on the engine's thread."""

    def __init__(self, config: RankConfig, engine: Engine, device: torch.device, parallel: TensorParallel) -> None:
        self.config = config
        self.engine = engine
        self.device = device
        self.parallel = parallel
        self._loaded: _Loaded | None = None
        self._pool: KvPool | None = None
        self._sessions: dict[int, Assignment] = {}
        self._calls: dict[Kind, Callable[[int, bytes], bytes]] = {
            Kind.ASSIGN: self.assign,
            Kind.OFFER_LINK: self.offer_link,
            Kind.CONNECT_LINK: self.connect_link,
            Kind.ACTIVATE: self.activate,
            Kind.RELEASE: self.release,
            Kind.OPEN_SESSION: self.open_session,
            Kind.CLOSE_SESSION: self.close_session,
        }
        engine.handle = self.handle

    def handle(self, kind: Kind, ident: int, payload: bytes) -> None:
        """One frame of the agent. A call is answered by REPLY or ERROR; a message of a session by results."""
        if kind == Kind.RUN:
            self.run_message(ident, payload)
        elif kind == Kind.SHUTDOWN:
            self.engine.stopping = True
        else:
            try:
                reply = self._calls[kind](ident, payload)
            except StagemeshError as e:
                self.engine.control.send_packed(pack_error(ident, e))
            except (RuntimeError, OSError, ValueError, MemoryError) as e:
                log.exception("%s failed", kind.name)
                self.engine.control.send_packed(pack_error(ident, e))
            else:
                self.engine.control.send(Kind.REPLY, ident, reply)

    # -- assignments ------------------------------------------------------------------------------------------------

    def assign(self, ident: int, payload: bytes) -> bytes:
        """Loads the range (or keeps it, when it is the one in memory) and allocates KV pages."""
        request = stage_pb2.AssignRequest.FromString(payload)
        for key, held in list(self.engine.assignments.items()):
            if held.pipeline_id == request.key.pipeline_id:
                held.close()
                del self.engine.assignments[key]
        shard = self._shard_for(ident, request)
        pool = self._pool_for(shard, request.limits)
        assignment = Assignment(request, shard, pool, self.config.rank)
        self.engine.assignments[request.key.pipeline_id, request.stage] = assignment
        layers = f"layers {request.layers.first}-{request.layers.last - 1}"
        process.set_title(f"stage {request.stage} {layers} rank {self.config.rank}")
        tokens = pool.num_pages * pool.page_size
        log.info(
            "stage %d, %s: %d KV pages of %d tokens = %d tokens, %.1f requests of %d tokens at once",
            request.stage, layers, pool.num_pages, pool.page_size, tokens,
            tokens / request.limits.max_model_len, request.limits.max_model_len,
        )  # fmt: skip
        return stage_pb2.AssignDone(
            num_pages=pool.num_pages // max(1, request.limits.gateways),
            page_bytes=pool.bytes_per_page,
            weight_bytes=shard.weight_bytes,
            tensor_bytes_read=shard.tensor_bytes_read,
            fingerprint=request.model.fingerprint,
            vocab_size=shard.vocab_size,
        ).SerializeToString()

    def _shard_for(self, ident: int, request: stage_pb2.AssignRequest) -> Shard:
        model = request.model
        spec = ShardSpec(
            model_dir=model.path,
            first=request.layers.first,
            last=request.layers.last,
            dtype=model.dtype or "auto",  # type: ignore[arg-type]
            device=str(self.device),
            tp_rank=self.config.rank,
            tp_size=self.config.size,
            load_format=model.load_format or "auto",  # type: ignore[arg-type]
            seed=model.seed,
            page_size=request.limits.page_size,
            threads=self.config.compute_threads,
            enforce_eager=self.config.enforce_eager,
        )
        if self._loaded is not None and (self._loaded.spec, self._loaded.fingerprint) == (spec, model.fingerprint):
            return self._loaded.shard
        # The old weights go first: both together may not fit.
        self._loaded = self._pool = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        last_told = 0.0

        def on_progress(done: int, total: int) -> None:
            nonlocal last_told
            now = time.monotonic()
            if now - last_told > 0.05 or done == total:
                last_told = now
                progress = stage_pb2.AssignResponse(loaded_bytes=done, total_bytes=total)
                self.engine.control.send(Kind.PROGRESS, ident, progress.SerializeToString())

        shard = load_shard(spec, self.parallel, on_progress)
        shard.on_layer = self.engine.drive_transports
        self._loaded = _Loaded(spec, model.fingerprint, shard)
        return shard

    def _pool_for(self, shard: Shard, limits: types_pb2.RunLimits) -> KvPool:
        gateways = max(1, limits.gateways)
        pool = self._pool
        if (
            pool is not None
            and pool.page_size == limits.page_size
            and limits.num_pages in (0, pool.num_pages)
            and pool.num_pages // gateways * limits.page_size >= limits.max_model_len
        ):
            # Made for this shard from the memory there was; asked again, its own pages would count as taken.
            return pool
        self._pool = pool = None
        page_bytes = KvPool.page_bytes(shard.kv_layers, limits.page_size, shard.dtype)
        one_sequence = -(-limits.max_model_len // limits.page_size)
        budget = self._kv_budget_bytes()
        pages = limits.num_pages or min(one_sequence * limits.max_num_seqs * gateways, budget // page_bytes)
        if pages // gateways < one_sequence:
            raise ConfigError(
                f"one request of --max-model-len {limits.max_model_len} needs {one_sequence} KV pages of {page_bytes} "
                f"bytes here, and there are {pages} for {gateways} gateway(s): lower --max-model-len to "
                f"{pages // gateways * limits.page_size}, or raise --num-kv-pages / --kv-cache-gib (now "
                f"{budget / 2**30:.2f} GiB)"
            )
        self._pool = KvPool(shard.kv_layers, pages, limits.page_size, shard.dtype, self.device)
        shard.bind_kv(self._pool)
        return self._pool

    def _kv_budget_bytes(self) -> int:
        if self.config.kv_cache_gib is not None:
            return int(self.config.kv_cache_gib * 2**30)
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return max(0, int(total * self.config.gpu_memory_utilization) - (total - free))
        return int(available_memory_bytes() * CPU_KV_SHARE / self.config.size)

    def activate(self, ident: int, payload: bytes) -> bytes:
        """Starts taking sessions."""
        request = stage_pb2.ActivateRequest.FromString(payload)
        self._assignment(request.key, request.stage).active = True
        return stage_pb2.ActivateResponse().SerializeToString()

    def release(self, ident: int, payload: bytes) -> bytes:
        """Ends an assignment; the weights stay in memory for the next one that wants them."""
        request = stage_pb2.ReleaseRequest.FromString(payload)
        for key, held in list(self.engine.assignments.items()):
            if held.pipeline_id == request.key.pipeline_id and held.epoch <= request.key.epoch:
                held.close()
                del self.engine.assignments[key]
        return stage_pb2.ReleaseResponse().SerializeToString()

    def _assignment(self, key: stage_pb2.PipelineKey, stage: int) -> Assignment:
        held = self.engine.assignments.get((key.pipeline_id, stage))
        if held is None:
            raise NotFound(f"this worker does not hold stage {stage} of {key.pipeline_id}")
        if held.epoch != key.epoch:
            raise StaleEpoch(f"{key.pipeline_id} is at epoch {held.epoch} here, not {key.epoch}")
        return held

    # -- links ------------------------------------------------------------------------------------------------------

    def offer_link(self, ident: int, payload: bytes) -> bytes:
        """Makes this rank's receiving end."""
        request = stage_pb2.OfferLinkRequest.FromString(payload)
        held = self._assignment(request.key, request.stage)
        if request.tokens and self.config.rank > 0:
            return b""
        transport = self._transport(request.transport)
        secret = secrets.token_bytes(16)
        source = 0
        if not request.tokens:
            source = sending_rank(self.config.rank, len(request.sender_addresses), self.config.size)
        link = LinkReceiver(
            transport,
            request.sender_addresses[source],
            self._identity(held, request.nonces[self.config.rank], secret, request.tokens),
            device="cpu" if request.tokens else self.device,
            timeout_s=LINK_TIMEOUT_S,
        )
        held.take_receiver(link, tokens=request.tokens)
        return stage_pb2.OfferLinkResponse(
            receiver_addresses=[transport.address()], secrets=[secret]
        ).SerializeToString()

    def connect_link(self, ident: int, payload: bytes) -> bytes:
        """Makes this rank's sending ends and shakes hands; receiving ranks that read from another rank are not ours."""
        request = stage_pb2.ConnectLinkRequest.FromString(payload)
        held = self._assignment(request.key, request.stage)
        transport = self._transport(request.transport)
        receivers = len(request.receiver_addresses)
        mine = [r for r in range(receivers) if sending_rank(r, self.config.size, receivers) == self.config.rank]
        if request.tokens:
            mine = [0] if self.config.rank == 0 else []
        senders = [
            LinkSender(
                transport,
                request.receiver_addresses[r],
                self._identity(held, request.nonces[r], request.secrets[r], request.tokens),
                timeout_s=LINK_TIMEOUT_S,
            )
            for r in mine
        ]
        held.take_senders(senders, tokens=request.tokens)
        deadline = time.monotonic() + LINK_TIMEOUT_S
        while not all(sender.ready for sender in senders):
            self.engine.progress()
            failed = next((sender.error for sender in senders if sender.error is not None), None)
            if failed is not None:
                raise failed
            if time.monotonic() > deadline:
                raise TransportError(f"no handshake from {request.receiver_id} over {request.transport}")
            self.engine.sleep(with_control=False)
        route = ", ".join(sorted({sender.route for sender in senders}))
        if route:
            log.info("link of stage %d to %s goes over %s: %s", held.stage, request.receiver_id, transport.name, route)
        return stage_pb2.ConnectLinkResponse(route=route).SerializeToString()

    @staticmethod
    def _identity(held: Assignment, nonce: int, secret: bytes, tokens: bool) -> LinkIdentity:
        if tokens:
            return LinkIdentity(nonce, held.epoch, secret, 1, torch.int32)
        return LinkIdentity(nonce, held.epoch, secret, held.shard.hidden_size, held.shard.dtype)

    def _transport(self, name: str) -> Transport:
        if name not in self.engine.transports:
            raise NotFound(f"transport {name!r} is not open here; open: {', '.join(self.engine.transports)}")
        return self.engine.transports[name]

    # -- sessions ---------------------------------------------------------------------------------------------------

    def open_session(self, ident: int, payload: bytes) -> bytes:
        """Opens a gateway's session; the payload is the gateway's RunOpen, the id names the session from now on."""
        request = stage_pb2.RunOpen.FromString(payload)
        held = self._assignment(request.key, request.stage)
        session = held.open_session(ident, request.slot)
        self._sessions[ident] = held
        return stage_pb2.RunOpened(
            num_pages=session.context.num_pages,
            page_size=session.context.page_size,
            steps_in_flight=held.limits.steps_in_flight,
        ).SerializeToString()

    def close_session(self, ident: int, payload: bytes) -> bytes:
        """Closes the session that the payload's number names."""
        session = int.from_bytes(payload, "little")
        held = self._sessions.pop(session, None)
        if held is not None:
            held.close_session(session)
        return b""

    def run_message(self, ident: int, payload: bytes) -> None:
        """A gateway's message within a session; a wrong one ends the session, never the rank."""
        held = self._sessions.get(ident)
        session: Session | None = held.sessions.get(ident) if held is not None else None
        if held is None or session is None:
            return  # It was closed while this message was under way; the gateway has been told.
        if session.failed:
            return
        try:
            request = stage_pb2.RunRequest.FromString(payload)
            match request.WhichOneof("message"):
                case "plan":
                    held.add_plan(session, request.plan)
                case "open_sequence":
                    session.open_sequence(request.open_sequence)
                case "close_sequence":
                    session.close_sequence(request.close_sequence)
        except StagemeshError as e:
            self.engine.end_session(session, e)
        except DecodeError as e:
            self.engine.end_session(session, InvalidRequest(f"a message of the session cannot be read: {e}"))


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


def main(argv: list[str]) -> int:
    """Runs the rank until the agent is gone."""
    config = RankConfig.from_json(argv[1])
    process.set_title(f"{config.label} rank {config.rank}")
    process.die_with_parent(config.parent_pid)
    process.not_preferred()
    process.set_up_logging(f"{config.label} rank {config.rank}")
    # Ctrl-C goes to the whole terminal group; it is the agent that decides when a rank ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if config.cpus:
        os.sched_setaffinity(0, config.cpus)
    torch.set_num_threads(config.compute_threads)
    control = Socket(socket.socket(fileno=config.control_fd))
    order = [socket.socket(fileno=fd) for fd in config.order_fds]
    device = torch.device(f"cuda:{config.rank}" if config.device == "cuda" else "cpu")
    preload(
        ShardSpec(config.model or "", 0, 1, device=str(device), tp_size=config.size, enforce_eager=config.enforce_eager)
    )
    parallel = TensorParallel(
        config.rank, config.size, store_path=config.store_path, exchange_fd=config.exchange_fd, device=str(device)
    )
    try:
        transports = open_transports(config)
        engine = Engine(
            control,
            transports,
            Leader(order) if config.size > 1 and config.rank == 0 else None,
            Follower(order[0]) if config.rank > 0 else None,
        )
        Rank(config, engine, device, parallel)
        info = measure(device)
    except StagemeshError as e:
        control.send_packed(pack_error(0, e))
        return 1
    addresses = {name: transport.address().hex() for name, transport in transports.items()}
    control.send(Kind.READY, 0, dumps({"device": info.SerializeToString().hex(), "addresses": addresses}))
    engine.run()
    for held in engine.assignments.values():
        held.close()
    for transport in transports.values():
        transport.close()
    parallel.close()
    return 0


if __name__ == "__main__":
    # The interpreter's own teardown of torch, gloo and UCX threads has no work left that matters, and can hang.
    code = 1
    try:
        code = main(sys.argv)
    except Exception:
        log.exception("this rank ends, and with it its group")
    finally:
        logging.shutdown()
        os._exit(code)
