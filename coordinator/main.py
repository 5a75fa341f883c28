"""The coordinator's process."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import signal
import socket
import time
from dataclasses import astuple, dataclass

import uvloop

from stagemesh import process, rpc
from stagemesh.checkpoint import CheckpointInfo, fingerprint, inspect
from stagemesh.errors import ConfigError
from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2
from stagemesh.settings.coordinator import CoordinatorSettings

from .api_server import ApiServer
from .charge import Charge
from .cost import CostModel
from .driver import Driver
from .lease import Lease
from .nonce import Nonces
from .partition import check_counts
from .planning import Target
from .reconfigure import Mesh
from .service import CoordinatorService
from .slots import MAX_SLOT, Slots
from .store import Store
from .values import Limits
from .views import limits as limits_message

log = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 4096
STOP_GRACE_S = 0.1


@dataclass(frozen=True)
class Build:
    """What settings and checkpoint together ask for."""

    target: Target
    model: types_pb2.ModelRef


def build(settings: CoordinatorSettings) -> Build:
    """Reads the checkpoint and checks the settings against it. Raises ConfigError and CheckpointError."""
    info = inspect(settings.model, settings.load_format)
    stages = settings.pipeline_parallel_size
    check_counts(info.num_layers, stages, settings.layer_partition)
    limits = _limits(settings, info)
    dtype = info.dtype if settings.dtype == "auto" else settings.dtype
    model = model_ref(settings.model, settings, info, dtype)
    model.name = settings.name
    draft = _add_draft(settings, info, model, limits.max_model_len)
    terms = hashlib.sha256(model.SerializeToString(deterministic=True) + repr(astuple(limits)).encode())
    terms.update(repr((stages, settings.layer_partition, settings.transport)).encode())
    target = Target(
        cost=CostModel(info, limits, dtype, draft),
        num_stages=stages,
        limits=limits,
        fingerprint=model.fingerprint,
        layer_partition=tuple(settings.layer_partition) if settings.layer_partition else None,
        transport=settings.transport,
        terms=terms.hexdigest(),
        takeover_s=settings.takeover_after,
        rebalance=settings.rebalance == "auto",
    )
    return Build(target, model)


def model_ref(path: str, settings: CoordinatorSettings, info: CheckpointInfo, dtype: str) -> types_pb2.ModelRef:
    """A checkpoint as workers are told of it, named after its folder."""
    return types_pb2.ModelRef(
        name=os.path.basename(os.path.abspath(path)),
        path=os.path.abspath(path),
        fingerprint=fingerprint(path, settings.load_format),
        num_layers=info.num_layers,
        hidden_size=info.hidden_size,
        dtype=dtype,
        load_format=settings.load_format,
        seed=settings.seed,
        deterministic=settings.deterministic,
    )


def _add_draft(
    settings: CoordinatorSettings, info: CheckpointInfo, model: types_pb2.ModelRef, max_model_len: int
) -> CheckpointInfo | None:
    """Writes the draft model that the settings name into `model`, in whose dtype it computes; what its files hold."""
    config = settings.speculative_config
    if config is None or config.model is None:
        return None
    draft = inspect(config.model, settings.load_format)
    if draft.vocab_size != info.vocab_size:
        raise ConfigError(
            f"the draft model {config.model} has a vocabulary of {draft.vocab_size}, the model has {info.vocab_size}: "
            "take a draft model with the same tokenizer"
        )
    if draft.max_position_embeddings < max_model_len:
        raise ConfigError(
            f"the draft model {config.model} was made for {draft.max_position_embeddings} positions, and "
            f"--max-model-len is {max_model_len}: lower it, or take another draft model"
        )
    model.draft.num_tokens = config.num_speculative_tokens
    model.draft.model.CopyFrom(model_ref(config.model, settings, draft, model.dtype))
    return draft


def _limits(settings: CoordinatorSettings, info: CheckpointInfo) -> Limits:
    longest = info.max_position_embeddings
    wanted = settings.max_model_len
    if wanted is not None and wanted > longest:
        raise ConfigError(
            f"--max-model-len {wanted} is above the {longest} positions that the model was made for "
            f"(max_position_embeddings in config.json): use --max-model-len {longest} or less"
        )
    limits = Limits(
        max_model_len=wanted or min(longest, DEFAULT_MAX_MODEL_LEN),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        page_size=settings.block_size,
        num_pages=settings.num_kv_pages or 0,
        steps_in_flight=settings.steps_in_flight or default_steps_in_flight(settings.pipeline_parallel_size),
        gateways=settings.gateways,
    )
    if 0 < limits.num_pages < limits.pages_per_sequence:
        held, need = limits.num_pages * limits.page_size, limits.pages_per_sequence
        raise ConfigError(
            f"--num-kv-pages {limits.num_pages} of {limits.page_size} tokens hold {held} tokens, one sequence of "
            f"--max-model-len {limits.max_model_len} needs {need} pages: use --num-kv-pages {need} or "
            f"--max-model-len {held}"
        )
    return limits


FEW_STAGES = 4
"""Below so many, another batch of decode rows costs more (each streams the weights) than the bubble it would fill."""


def default_steps_in_flight(stages: int) -> int:
    """Batches that decode rows are spread over: one a stage, and in a longer pipeline one more to hide its hops."""
    return stages if stages < FEW_STAGES else stages + 1


def run(settings: CoordinatorSettings, ready_fd: int | None = None) -> int:
    """Runs a coordinator until SIGTERM or SIGINT; returns the exit status.

    When it listens, one JSON line {"port": N} goes to `ready_fd`, which is then closed. Raises ConfigError and
    CheckpointError for what makes the mesh impossible from the start.
    """
    process.set_title("coordinator")
    process.set_up_logging("coordinator")
    process.prefer()
    return uvloop.run(_run(settings, build(settings), ready_fd))


async def _run(settings: CoordinatorSettings, built: Build, ready_fd: int | None) -> int:
    """Serves once no other coordinator is in charge; the exit status."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    charge = Charge(settings.state_dir) if settings.state_dir is not None else None
    lease = make_lease(settings)
    try:
        if (charge is None or await charge.take(stop)) and (lease is None or await lease.take(stop)):
            store = Store(settings.state_dir)
            try:
                return await _serve(settings, built, store, ready_fd, stop, lease)
            finally:
                store.close()
    finally:
        if charge is not None:
            charge.close()
    return 0


def make_lease(settings: CoordinatorSettings) -> Lease | None:
    """The Lease that the settings name. Raises ConfigError outside a pod."""
    if settings.kubernetes_lease is None:
        return None
    identity = settings.lease_identity or f"{socket.gethostname()}_{secrets.token_hex(4)}"
    return Lease(ApiServer(settings.kubernetes_account), settings.kubernetes_lease, identity, settings.lease_duration)


async def _serve(
    settings: CoordinatorSettings,
    built: Build,
    store: Store,
    ready_fd: int | None,
    stop: asyncio.Event,
    lease: Lease | None,
) -> int:
    service = make_service(built, store, lease)
    model, limits = built.model, built.target.limits
    log.info(
        "model %s: %d layers, %s, revision %s; %d stages, %d tokens a sequence at most, %d steps in flight",
        *(model.name, model.num_layers, model.dtype, model.fingerprint[:12]),
        *(built.target.num_stages, limits.max_model_len, limits.steps_in_flight),
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
        # The clock ends only by an error, which must end the process: a coordinator without one sees nobody go.
        await asyncio.wait([clock, stopped, *([kept] if kept else [])], return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        clock.cancel()
        await service.stop()
        await server.stop(STOP_GRACE_S)
        with contextlib.suppress(asyncio.CancelledError):
            await clock
    if lease is None or kept is None:
        return 0
    if kept.done():
        log.error("no longer in charge: %s", kept.result())
        return 1
    kept.cancel()
    await asyncio.gather(kept, return_exceptions=True)
    await lease.give_up()
    return 0


def make_service(built: Build, store: Store, lease: Lease | None = None) -> CoordinatorService:
    """The service with its core; to be made on a running loop. With a Lease, its epochs are of that one's term."""
    now = time.monotonic()
    mesh = Mesh(
        built.target,
        now=now,
        nonce=Nonces().next,
        epochs=store.epochs(),
        plans=store.plans(),
        replicas=store.replicas(),
        wished=store.partition(built.target.terms),
        drains=store.drains(),
        first_epoch=lease.first_epoch if lease is not None else 1,
    )
    stored = store.slots()
    # Without a store, a random start keeps a restarted coordinator off the slots of gateways that still live.
    first = max(stored, default=secrets.randbelow(MAX_SLOT)) % MAX_SLOT + 1
    slots = Slots(stored, now=now, first=first)
    bounds = limits_message(built.target.limits)
    return CoordinatorService(
        mesh,
        store,
        slots,
        built.model,
        lambda post: Driver(post, built.model, bounds),
        in_charge=lambda: lease is None or lease.is_sure,
    )
