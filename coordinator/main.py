"""The coordinator's process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
import time

import uvloop

from stagemesh import process, rpc
from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc
from stagemesh.settings.coordinator import CoordinatorSettings

from .build import build
from .planning.target import Target
from .service.service import CoordinatorService
from .service.slots import MAX_SLOT, Slots
from .state.kubernetes_lease import ApiServer, Lease
from .state.nonces import nonces
from .state.store import Store, open_store
from .timing import CoordinatorTiming
from .world.world import World

log = logging.getLogger(__name__)


def run(settings: CoordinatorSettings, ready_fd: int | None = None) -> int:
    """Runs a coordinator until SIGTERM or SIGINT; returns the exit status.

    When it listens, it writes one JSON line {"port": N} to `ready_fd` and closes it. Raises ConfigError and
    CheckpointError when no mesh can be built from the settings and the checkpoint.
    """
    process.set_title("coordinator")
    process.set_up_logging("coordinator")
    process.prefer()
    return uvloop.run(_run(settings, build(settings), ready_fd))


async def _run(settings: CoordinatorSettings, target: Target, ready_fd: int | None) -> int:
    """Waits until no other coordinator is the leader, then serves. Returns the exit status."""
    timing = CoordinatorTiming().scaled(settings.time_scale)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    lease = make_lease(settings, timing)
    store = await open_store(settings.state_dir, timing.leader_look_s, stop)
    if store is None:
        return 0
    with contextlib.closing(store):
        if lease is not None and not await lease.take(stop):
            return 0
        service = make_service(target, store, timing, lease)
        return await _serve(settings, target, service, timing, ready_fd, stop, lease)


def make_lease(settings: CoordinatorSettings, timing: CoordinatorTiming) -> Lease | None:
    """The Lease that the settings name, if any. Raises ConfigError outside a pod."""
    if settings.kubernetes_lease is None:
        return None
    identity = settings.lease_identity or f"{socket.gethostname()}_{secrets.token_hex(4)}"
    api = ApiServer(settings.kubernetes_account, timing.api_call_s)
    return Lease(api, settings.kubernetes_lease, identity, settings.lease_duration)


async def _serve(
    settings: CoordinatorSettings,
    target: Target,
    service: CoordinatorService,
    timing: CoordinatorTiming,
    ready_fd: int | None,
    stop: asyncio.Event,
    lease: Lease | None,
) -> int:
    model, limits = target.model, target.limits
    log.info(
        "model %s: %d layers, %s, revision %s; %d stages, %d tokens a sequence at most, %d steps in flight",
        *(model.name, model.num_layers, model.dtype, model.fingerprint[:12]),
        *(target.num_stages, limits.max_model_len, limits.steps_in_flight),
    )
    server = await rpc.start_server(
        settings.host,
        settings.port,
        lambda s: coordinator_pb2_grpc.add_CoordinatorServicer_to_server(service, s),
        [coordinator_pb2.DESCRIPTOR.services_by_name["Coordinator"].full_name],
    )
    log.info("coordinator listens on %s:%d", settings.host, server.port)
    process.tell_ready(ready_fd, port=server.port)
    clock = asyncio.create_task(service.run())
    stopped = asyncio.create_task(stop.wait())
    kept = asyncio.create_task(lease.keep()) if lease is not None else None
    try:
        # The clock task ends only with an error, which must end the process: without ticks no lease runs out.
        await asyncio.wait([clock, stopped, *([kept] if kept else [])], return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        clock.cancel()
        await service.stop()
        await server.stop(timing.stop_grace_s)
        with contextlib.suppress(asyncio.CancelledError):
            await clock
    if lease is None or kept is None:
        return 0
    if kept.done():
        log.error("no longer the leader: %s", kept.result())
        return 1
    kept.cancel()
    await asyncio.gather(kept, return_exceptions=True)
    await lease.give_up()
    return 0


def make_service(
    target: Target, store: Store, timing: CoordinatorTiming, lease: Lease | None = None
) -> CoordinatorService:
    """The service with its core. Needs a running loop. With a Lease, its epochs belong to the Lease's term."""
    now = time.monotonic()
    world = World(
        target,
        now=now,
        nonce=nonces().__next__,
        timing=timing,
        record=store.load(target.terms),
        first_epoch=lease.first_epoch if lease is not None else 1,
    )
    stored = store.slots()
    # Without stored slots, a random start avoids the slots of gateways that outlived the coordinator before.
    first = max(stored, default=secrets.randbelow(MAX_SLOT)) % MAX_SLOT + 1
    slots = Slots(stored, now=now, quarantine_s=timing.slot_quarantine_s, first=first)
    return CoordinatorService(world, store, slots, is_leader=lambda: lease is None or lease.is_sure)
