"""The `stagemesh` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import stagemesh
from stagemesh.settings.loading import load

from . import bench, download, operate, plan, status
from .flags import add_flags, given
from .service import SERVICES, reported, run_function, settings_class


def parser() -> argparse.ArgumentParser:
    """Makes the parser of the whole command line."""
    top = argparse.ArgumentParser(prog="stagemesh", description=stagemesh.__doc__)
    top.add_argument("--version", action="version", version=f"stagemesh {stagemesh.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, _, text) in SERVICES.items():
        cls = settings_class(name)
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == "serve":
            command.add_argument(
                "model",
                nargs="?",
                default=argparse.SUPPRESS,
                help="checkpoint directory, or id on a hub (org/name) [the demo]",
            )
        else:
            command.add_argument("--ready-fd", type=int, default=None, help=argparse.SUPPRESS)
        add_flags(command, cls, leave_out=("model",) if name == "serve" else ())
        command.add_argument("--config", metavar="FILE", help="YAML file of settings")
        command.set_defaults(run=_run)
    bench.add_parser(commands)
    plan.add_parser(commands)
    shows = commands.add_parser("status", help="show the mesh that a gateway sees")
    shows.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway's HTTP address")
    shows.set_defaults(run=status.run)
    operate.add_parsers(commands)
    download.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit status: 2 for wrong usage or settings, 1 for a failure at run time."""
    namespace = parser().parse_args(argv)
    return reported(namespace.command, lambda: namespace.run(namespace))


def _run(namespace: argparse.Namespace) -> int:
    cls, run = settings_class(namespace.command), run_function(namespace.command)
    settings = load(cls, file=namespace.config, given=given(namespace, cls))
    status: int = run(settings) if namespace.command == "serve" else run(settings, namespace.ready_fd)
    return status


if __name__ == "__main__":
    sys.exit(main())
