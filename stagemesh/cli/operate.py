"""Operators' commands to the coordinator: `stagemesh drain`, `stagemesh repartition`, `stagemesh scale`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import grpc

from stagemesh import rpc
from stagemesh.errors import ConfigError, DeadlineExceeded, Unavailable
from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2

from .status import fetch_mesh

CALL_TIMEOUT_S = 10.0
LOOK_S, RETRY_S = 0.05, 0.2
AWAY_S = 5.0
"""Time for which calls to a coordinator that does not answer are repeated."""


def add_parsers(commands: Any) -> None:
    """Adds the commands to the parser."""
    drain = commands.add_parser(
        "drain",
        help="take a worker out of service; its layers move to another one that can hold them",
        description="Takes a worker out of service. Its layers move to a standby or another worker of its pool, with "
        "their data of running requests, while these go on. Refused if no worker can take them.",
    )
    drain.add_argument(
        "--force", action="store_true", help="also if no worker can: running requests finish, and no new ones start"
    )
    undrain = commands.add_parser("undrain", help="cancel a drain: the worker may hold stages again")
    for command in (drain, undrain):
        command.add_argument("worker", metavar="WORKER", help="its name, as `stagemesh status` shows it")
    repartition = commands.add_parser(
        "repartition",
        help="give the stages other layers while requests go on",
        description="Gives the stages other layers. Layers that change workers move with their data of running "
        "requests, while these go on.",
    )
    repartition.add_argument("counts", metavar="COUNTS", help="layers of each stage, such as 5,7; or auto")
    scale = commands.add_parser(
        "scale",
        help="have more or fewer workers serve a stage at once",
        description="Sets the number of workers that serve a stage at once. With each further one, one more pipeline "
        "runs over the stages that have fewer, and requests are distributed over all pipelines. With one fewer, a "
        "pipeline finishes its requests. Those left after a while continue in another pipeline.",
    )
    scale.add_argument("stage", metavar="STAGE", type=int, help="the stage, from 0")
    scale.add_argument(
        "replicas", metavar="REPLICAS", help="how many workers; or auto: as many as were started for it with --stage"
    )
    operations = ((drain, _drain), (undrain, _undrain), (repartition, _repartition), (scale, _scale))
    for command, operation in operations:
        command.add_argument("--url", default="http://127.0.0.1:8000", help="a gateway's HTTP address")
        command.add_argument("--coordinator", help="the coordinator's gRPC address [what the gateway says]")
        command.add_argument("--timeout", type=float, default=120.0, help="seconds to wait until it is done [120]")
        command.set_defaults(run=run, operation=operation)


def run(namespace: argparse.Namespace) -> int:
    """Runs one of the commands. Raises NotFound, ConfigError, Unavailable, DeadlineExceeded."""
    address = namespace.coordinator or fetch_mesh(namespace.url)["gateway"]["coordinator"]
    with grpc.insecure_channel(address) as channel:
        namespace.operation(namespace, coordinator_pb2_grpc.CoordinatorStub(channel))
    return 0


def _call(method: Any, request: Any, timeout_s: float = AWAY_S) -> Any:
    """Calls the coordinator, and retries for `timeout_s` while it is away: a restart takes it a second or two."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with rpc.mapped():
                return method(request, timeout=CALL_TIMEOUT_S)
        except Unavailable:
            if time.monotonic() > deadline:
                raise
        time.sleep(RETRY_S)


def _wait(stub: Any, timeout_s: float, left: Callable[[Any], str]) -> float:
    """Waits until `left` returns an empty text. Returns the seconds that this took. Raises DeadlineExceeded."""
    began = time.monotonic()
    while what := left(_call(stub.DescribeMesh, coordinator_pb2.DescribeMeshRequest(), timeout_s).mesh):
        if time.monotonic() - began > timeout_s:
            raise DeadlineExceeded(f"after {timeout_s:g} s, {what}")
        time.sleep(LOOK_S)
    return time.monotonic() - began


def _drain(namespace: argparse.Namespace, stub: Any) -> None:
    worker: str = namespace.worker
    request = coordinator_pb2.DrainRequest(worker_id=worker, force=namespace.force)

    def left(mesh: Any) -> str:
        if any(w.worker_id == worker and w.state not in ("draining", "lost") for w in mesh.workers):
            # A drain is for one life of a worker's ranks: they have been replaced meanwhile.
            _call(stub.Drain, request)
            return f"{worker} is asked to drain"
        stages = [(p, s) for p in mesh.pipelines for s in p.stages if s.worker_id == worker]
        said = "; ".join(f"{p.pipeline_id} stage {s.stage}: {p.reason or 'moving'}" for p, s in stages)
        undo = f"`stagemesh undrain {worker}` takes the drain back"
        return f"{worker} still holds a stage: {said}; {undo}" if stages else ""

    _call(stub.Drain, request)
    print(f"{worker} holds no stage, after {_wait(stub, namespace.timeout, left):.1f} s")


def _undrain(namespace: argparse.Namespace, stub: Any) -> None:
    _call(stub.Undrain, coordinator_pb2.UndrainRequest(worker_id=namespace.worker))
    print(f"{namespace.worker} may hold stages again")


def _repartition(namespace: argparse.Namespace, stub: Any) -> None:
    request = coordinator_pb2.RepartitionRequest()
    if namespace.counts != "auto":
        try:
            request.counts.extend(int(count) for count in namespace.counts.split(","))
        except ValueError:
            raise ConfigError(f"{namespace.counts!r} is neither auto nor counts of layers, such as 5,7") from None
    answer = _call(stub.Repartition, request)
    wanted = list(answer.counts)
    shown = ",".join(map(str, wanted))
    if answer.slowest_us:
        print(f"the slowest stage takes {answer.slowest_us / 1000:.1f} ms a step; with {shown} layers it is expected "
              f"to take {answer.expected_us / 1000:.1f} ms")  # fmt: skip

    def left(mesh: Any) -> str:
        if mesh.given_up:
            raise Unavailable(f"the stages keep their layers: {mesh.given_up}")
        held = [[s.layers.last - s.layers.first for s in p.stages] for p in mesh.pipelines]
        return "" if all(counts == wanted for counts in held) else f"the stages hold {held} layers"

    print(f"the stages hold {shown} layers, after {_wait(stub, namespace.timeout, left):.1f} s")


def _scale(namespace: argparse.Namespace, stub: Any) -> None:
    automatic = namespace.replicas == "auto"
    if namespace.stage < 0 or not (automatic or (namespace.replicas.isdigit() and int(namespace.replicas))):
        raise ConfigError(f"scale {namespace.stage} {namespace.replicas}: a stage from 0 on, then 1 or more, or auto")
    replicas = 0 if automatic else int(namespace.replicas)
    request = coordinator_pb2.ScaleRequest(stage=namespace.stage, replicas=replicas)
    wanted = _call(stub.Scale, request).pipelines

    def left(mesh: Any) -> str:
        if mesh.given_up:
            raise Unavailable(mesh.given_up)
        serving = [p for p in mesh.pipelines if p.state == types_pb2.PIPELINE_STATE_SERVING and not p.HasField("next")]
        settled = [p for p in serving if p.limits.pipelines == wanted]
        if len(settled) == len(mesh.pipelines) == wanted:
            return ""
        others = [f"{p.pipeline_id}: {p.reason or 'pages are being split'}" for p in mesh.pipelines if p not in settled]
        return f"{len(settled)} of {wanted} pipelines serve: {'; '.join(others)}"

    took_s = _wait(stub, namespace.timeout, left)
    print(f"{wanted} pipeline(s) serve, after {took_s:.1f} s")
