"""The services by their commands, and the entry point of a child of `serve`.

A child runs one service. So this module imports nothing of the others: each worker of `serve` would wait for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from stagemesh.errors import CheckpointError, ConfigError, InternalError, StagemeshError
from stagemesh.processes.frames import parse
from stagemesh.protos.v1 import processes_pb2

USAGE_ERROR = 2

SERVICES = {
    "serve": ("settings.serve:ServeSettings", "local.supervisor:run", "start a whole mesh on this machine"),
    "coordinator": ("settings.coordinator:CoordinatorSettings", "coordinator.main:run", "run the coordinator"),
    "stage": ("settings.stage:StageSettings", "stage_worker.main:run", "run one stage worker"),
    "gateway": ("settings.gateway:GatewaySettings", "gateway.main:run", "run the gateway"),
}
"""Command -> (class of its settings, function that runs it, help text). The names are relative to this package."""


def settings_class(command: str) -> Any:
    """Imports the class of a service's settings."""
    # numpy's OpenBLAS would start a thread for each core of the machine when it is imported. Nobody uses them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    return resolve_name(f"stagemesh.{SERVICES[command][0]}")


def run_function(command: str) -> Any:
    """Imports a service's `run`, and with it all that the service needs."""
    return resolve_name(f"stagemesh.{SERVICES[command][1]}")


def reported(command: str, run: Callable[[], int]) -> int:
    """Runs a function and returns its exit status. Prints an error in one line on stderr."""
    try:
        return run()
    except StagemeshError as e:
        print(f"stagemesh {command}: {e.message}", file=sys.stderr)
        return USAGE_ERROR if isinstance(e, (ConfigError, CheckpointError)) else 1
    except KeyboardInterrupt:
        return 130


def run(argument: bytes, fds: list[int]) -> int:
    """Runs the service of a `ServiceStart`, which writes its ports to the one descriptor. Returns the exit status."""
    start = parse(processes_pb2.ServiceStart, argument)
    if start.command not in SERVICES or len(fds) != 1:
        raise InternalError(f"{start.command!r} with {len(fds)} descriptors is no service")
    settings = settings_class(start.command).model_validate_json(start.settings)
    return reported(start.command, lambda: run_function(start.command)(settings, fds[0]))
