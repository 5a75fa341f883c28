"""A rank process from its start to its end.

The rank opens its transports, measures its device and sends READY. Then it carries out orders (commands.py) until the
agent is gone.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket

import torch

from stagemesh import process
from stagemesh.errors import StagemeshError, TransportError
from stagemesh.hub.cache import known_folder
from stagemesh.hub.reference import parse
from stagemesh.protos.v1 import worker_pb2
from stagemesh.transport.base import Transport
from stagemesh.transport.select import open_transport
from stagemesh.transport.timing import TransportTiming
from stagemesh.transport.ucx.worker import load_ucxx

from ..messages.control import READY_ID, Kind, failure_of
from ..messages.heartbeat import Heartbeats
from ..messages.rank_config import RankConfig, RankDescriptors
from ..model.choose import import_for
from ..model.parallel import TensorParallel
from ..model.spec import ShardSpec
from ..timing import StageTiming
from .commands import RankCommands
from .control_socket import ControlSocket
from .engine import Engine
from .heartbeat import Heartbeat
from .measure import measure
from .order import OrderReceiver, OrderSender

log = logging.getLogger(__name__)


def open_transports(config: RankConfig) -> dict[str, Transport]:
    """Opens the transports of the settings. `auto` opens TCP, and UCX if that is possible."""
    settings = config.settings
    options = {"TLS": settings.ucx_tls, "NET_DEVICES": settings.net_device}
    wanted = ["ucx", "tcp"] if settings.transport == "auto" else [settings.transport]
    opened: dict[str, Transport] = {}
    for name in wanted:
        try:
            opened[name] = open_transport(
                name,
                host=settings.host,
                advertise=settings.advertise_host,
                device=config.device,
                ucx_options={key: value for key, value in options.items() if value},
                timing=TransportTiming().scaled(settings.time_scale),
            )
        except TransportError as e:
            if settings.transport != "auto":
                raise
            log.warning("links will use TCP, because UCX is not available: %s", e.message)
    return opened


def import_all(config: RankConfig) -> None:
    """Imports slow modules, as far as they are known before an assignment."""
    settings = config.settings
    device, eager = "cuda" if config.device == "cuda" else "cpu", settings.enforce_eager
    folder = settings.model or ""
    if hub := parse(folder, settings.revision):
        folder = str(known_folder(hub) or "")
    import_for(ShardSpec(folder, 0, 1, device=device, tp_size=config.size, enforce_eager=eager))
    if settings.transport != "tcp":
        # If UCX is missing, each rank reports that itself.
        with contextlib.suppress(TransportError):
            load_ucxx()


def preload(argument: bytes, fds: list[int]) -> int:
    """Imports the modules of ranks, in their forkserver. `argument`: argument of one rank. Returns an exit status."""
    import_all(RankConfig.unpack(argument))
    return 0


def run(argument: bytes, fds: list[int]) -> int:
    """Runs a rank until its agent is gone. Returns an exit status.

    See `RankConfig.pack` for `argument`, and `RankDescriptors.in_order` for `fds`.
    """
    config = RankConfig.unpack(argument)
    descriptors = RankDescriptors.of(config, fds)
    timing = StageTiming().scaled(config.settings.time_scale)
    process.set_title(config.title)
    process.set_up_logging(config.title)
    if config.cpus:
        os.sched_setaffinity(0, config.cpus)
    torch.set_num_threads(config.compute_threads)

    def control_socket(fd: int) -> ControlSocket:
        return ControlSocket(socket.socket(fileno=fd), timing.write_s)

    control = control_socket(descriptors.control)
    orders = [control_socket(fd) for fd in descriptors.orders]
    device = torch.device(f"cuda:{config.rank}" if config.device == "cuda" else "cpu")
    import_all(config)
    # Garbage collections need not look at the imported modules.
    gc.freeze()
    parallel = TensorParallel(
        config.rank,
        config.size,
        # Opens the file behind the descriptor anew, with locks of its own.
        store_path=f"/proc/self/fd/{descriptors.store}",
        exchange_fd=descriptors.exchange,
        device=str(device),
        timeout_s=timing.peers_s,
    )
    memory = Heartbeats(descriptors.heartbeats, config.size)
    heartbeat = Heartbeat(memory, config.rank, timing, cuda=device.type == "cuda")
    try:
        transports = open_transports(config)
        engine = Engine(
            control,
            transports,
            OrderSender(orders) if orders and config.rank == 0 else None,
            OrderReceiver(orders[0], timing.order_s) if config.rank > 0 else None,
            heartbeat,
            timing,
        )
        RankCommands(config, engine, device, parallel, timing)
        info = measure(device, config.size)
    except StagemeshError as e:
        control.send(Kind.ERROR, READY_ID, failure_of(e))
        return 1
    addresses = {name: transport.address() for name, transport in transports.items()}
    control.send(Kind.READY, READY_ID, worker_pb2.RankReady(device=info, addresses=addresses))
    engine.run()
    for assignment in engine.assignments.values():
        assignment.close()
    for transport in transports.values():
        transport.close()
    parallel.close()
    return 0
