"""`stagemesh bench`: its command line."""

from __future__ import annotations

import argparse
import os
from typing import Any

from stagemesh.bench.options import TraceOptions
from stagemesh.errors import ConfigError
from stagemesh.settings.loading import load
from stagemesh.settings.model import DEMO_MODEL
from stagemesh.settings.serve import ServeSettings

from .flags import add_flags, given

API_KEY = "STAGEMESH_API_KEY"
OURS = ("model", "port", "grpc_port", "host", "insecure", *TraceOptions.model_fields)
"""Settings of `serve` that `bench` sets itself, or uses with another meaning."""


def add_parser(commands: Any) -> None:
    """Adds `bench` and its subcommands to the parser."""
    text = "measure a mesh"
    bench = commands.add_parser("bench", help=text, description=text, allow_abbrev=False)
    kinds = bench.add_subparsers(dest="bench", required=True, metavar="KIND")
    text = "trace steps of a running mesh, or of one started for it: trace.json, trace.svg and a table"
    trace = kinds.add_parser("trace", help=text, description=text, allow_abbrev=False)
    trace.add_argument(
        "model", nargs="?", help="checkpoint to start a mesh with, 'demo' for the one that ships; none: use --url"
    )
    add_flags(trace, TraceOptions)
    add_flags(trace.add_argument_group("with MODEL: how it is served"), ServeSettings, leave_out=OURS)
    trace.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Runs `bench trace`. Raises StagemeshError."""
    from stagemesh.bench.trace import run

    key = {API_KEY: os.environ[API_KEY]} if API_KEY in os.environ else {}
    options = load(TraceOptions, file=None, env=key, given=given(namespace, TraceOptions))
    settings = {k: v for k, v in given(namespace, ServeSettings).items() if k not in OURS}
    if namespace.model is not None and options.url is not None:
        raise ConfigError("give MODEL, to start a mesh, or --url, to trace a running one; not both")
    if namespace.model is not None:
        model = str(DEMO_MODEL) if namespace.model == "demo" else namespace.model
        return run(options, [model, "--port", "0", "--grpc-port", "0", *_as_flags(settings)])
    if settings:
        raise ConfigError(
            f"--{min(settings).replace('_', '-')} says how a mesh is served, and none is started: give MODEL "
            "('demo' for the one that ships)"
        )
    return run(options, None)


def _as_flags(settings: dict[str, Any]) -> list[str]:
    """Converts settings to flags of `serve`."""
    out = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        out.append(("--" if value else "--no-") + flag if isinstance(value, bool) else f"--{flag}={value}")
    return out
