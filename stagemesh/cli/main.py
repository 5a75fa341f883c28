"""The `stagemesh` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

import stagemesh
from stagemesh.errors import CheckpointError, ConfigError, StagemeshError
from stagemesh.settings.base import Base
from stagemesh.settings.coordinator import CoordinatorSettings
from stagemesh.settings.gateway import GatewaySettings
from stagemesh.settings.loading import load
from stagemesh.settings.serve import ServeSettings
from stagemesh.settings.stage import StageSettings

from . import bench, operate, status
from .flags import add_flags, given

USAGE_ERROR = 2

SERVICES: dict[str, tuple[type[Base], str, str]] = {
    "serve": (ServeSettings, "stagemesh.local.supervisor", "start a whole mesh on this machine"),
    "coordinator": (CoordinatorSettings, "stagemesh.coordinator.main", "run the coordinator"),
    "stage": (StageSettings, "stagemesh.stage_worker.main", "run one stage worker"),
    "gateway": (GatewaySettings, "stagemesh.gateway.main", "run the gateway"),
}
"""Command -> (settings, module with its `run`, help text). The module is imported when the command runs."""


def parser() -> argparse.ArgumentParser:
    """Makes the parser of the whole command line."""
    top = argparse.ArgumentParser(prog="stagemesh", description=stagemesh.__doc__)
    top.add_argument("--version", action="version", version=f"stagemesh {stagemesh.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (cls, _, text) in SERVICES.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == "serve":
            command.add_argument("model", nargs="?", default=argparse.SUPPRESS, help="checkpoint directory [the demo]")
            add_flags(command, cls, leave_out=("model",))
        else:
            command.add_argument("--ready-fd", type=int, default=None, help=argparse.SUPPRESS)
            add_flags(command, cls)
        command.add_argument("--config", metavar="FILE", help="YAML file of settings")
        command.set_defaults(run=_run)
    bench.add_parser(commands)
    shows = commands.add_parser("status", help="show the mesh that a gateway sees")
    shows.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway's HTTP address")
    shows.set_defaults(run=status.run)
    operate.add_parsers(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit status: 2 for wrong usage or settings, 1 for a failure at run time."""
    namespace = parser().parse_args(argv)
    return reported(namespace.command, lambda: namespace.run(namespace))


def reported(command: str, run: Callable[[], int]) -> int:
    """Runs a function and returns its exit status. Prints an error in one line on stderr."""
    try:
        return run()
    except StagemeshError as e:
        print(f"stagemesh {command}: {e.message}", file=sys.stderr)
        return USAGE_ERROR if isinstance(e, (ConfigError, CheckpointError)) else 1
    except KeyboardInterrupt:
        return 130


def _run(namespace: argparse.Namespace) -> int:
    cls, module, _ = SERVICES[namespace.command]
    run, settings = import_module(module).run, load(cls, file=namespace.config, given=given(namespace, cls))
    status: int = run(settings) if namespace.command == "serve" else run(settings, namespace.ready_fd)
    return status


if __name__ == "__main__":
    sys.exit(main())
