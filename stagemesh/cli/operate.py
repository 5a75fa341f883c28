"""What an operator tells the coordinator: `stagemesh drain`."""

from __future__ import annotations

import argparse
import time
from typing import Any

from stagemesh.errors import DeadlineExceeded

from .status import fetch

COMMANDS = ("drain",)
CALL_TIMEOUT_S = 10.0
LOOK_S = 0.05


def add_parsers(commands: Any) -> None:
    """Adds the operator's commands."""
    drain = commands.add_parser(
        "drain",
        help="take a worker out of service; its layers move to another one that can hold them",
        description="Takes a worker out of service. Its layers move to a standby or another worker of its pool, while "
        "requests go on. Where there is none, what runs is finished and nothing new is taken.",
    )
    drain.add_argument("worker", metavar="WORKER", help="its name, as `stagemesh status` shows it")
    drain.add_argument("--url", default="http://127.0.0.1:8000", help="a gateway's HTTP address")
    drain.add_argument("--coordinator", help="the coordinator's gRPC address [what the gateway says]")
    drain.add_argument("--timeout", type=float, default=120.0, help="seconds to wait until it holds nothing [120]")


def run(namespace: argparse.Namespace) -> int:
    """Runs one of the commands. Raises NotFound, Unavailable, DeadlineExceeded."""
    return _drain(namespace.worker, namespace.url, namespace.coordinator, namespace.timeout)


def _drain(worker: str, url: str, coordinator: str | None, timeout_s: float) -> int:
    import grpc

    from stagemesh import rpc
    from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc

    began = time.monotonic()
    with grpc.insecure_channel(coordinator or fetch(url)["gateway"]["coordinator"]) as channel, rpc.mapped():
        stub: Any = coordinator_pb2_grpc.CoordinatorStub(channel)
        stub.Drain(coordinator_pb2.DrainRequest(worker_id=worker), timeout=CALL_TIMEOUT_S)
        while True:
            mesh = stub.DescribeMesh(coordinator_pb2.DescribeMeshRequest(), timeout=CALL_TIMEOUT_S).mesh
            stages = [(p, s) for p in mesh.pipelines for s in p.stages if s.worker_id == worker]
            if not stages:
                break
            if time.monotonic() - began > timeout_s:
                said = "; ".join(f"{p.pipeline_id} stage {s.stage}: {p.reason or 'moving'}" for p, s in stages)
                raise DeadlineExceeded(f"{worker} still holds a stage after {timeout_s:g} s: {said}")
            time.sleep(LOOK_S)
    print(f"{worker} holds no stage, after {time.monotonic() - began:.1f} s")
    return 0
