"""The process that fetches a hub model's files for its agent.

It is not a thread, which would delay what the agent passes on while the worker serves. The agent kills it when the
assignment is withdrawn; what it has fetched by then stays.
"""

from __future__ import annotations

import socket
from enum import IntEnum

from stagemesh import process
from stagemesh.errors import StagemeshError
from stagemesh.hub.checkpoint import open_model
from stagemesh.hub.reference import HubModel
from stagemesh.hub.timing import HubTiming
from stagemesh.processes.frames import pack, parse
from stagemesh.protos.v1 import worker_pb2

from ..messages.control import failure_of


class FetchKind(IntEnum):
    """Kind of a frame from this process."""

    PROGRESS = 1
    """worker_pb2.FetchProgress."""
    DONE = 2
    """All files are there. No payload."""
    FAILED = 3
    """worker_pb2.Failure."""


def run(argument: bytes, fds: list[int]) -> int:
    """Fetches the files of a `FetchRequest`. Sends frames over the one descriptor. Returns an exit status."""
    request = parse(worker_pb2.FetchRequest, argument)
    process.set_title(f"fetch {request.repo}")
    process.set_up_logging(f"fetch {request.repo}")
    with socket.socket(fileno=fds[0]) as agent:

        def tell(here: int, total: int) -> None:
            progress = worker_pb2.FetchProgress(fetched_bytes=here, total_bytes=total)
            agent.sendall(pack(FetchKind.PROGRESS, 0, progress.SerializeToString()))

        try:
            timing = HubTiming().scaled(request.time_scale or 1.0)
            found = open_model(HubModel(request.repo, request.commit), timing)
            found.describe()
            if request.HasField("layers"):
                found.fetch_layers((request.layers.first, request.layers.last), request.num_layers, tell)
        except StagemeshError as e:
            agent.sendall(pack(FetchKind.FAILED, 0, failure_of(e).SerializeToString()))
            return 1
        agent.sendall(pack(FetchKind.DONE, 0))
    return 0
