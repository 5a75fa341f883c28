"""`stagemesh bench`: its command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from stagemesh.errors import ConfigError
from stagemesh.settings.model import DEMO_MODEL
from stagemesh.settings.serve import ServeSettings

from .flags import add_flags, given

OURS = ("model", "port", "grpc_port", "host", "insecure", "api_key", "seed")
"""Settings of `serve` that `bench` sets itself, or uses under another meaning."""
URL = "http://127.0.0.1:8000"


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
    trace.add_argument("--url", help=f"a running gateway's HTTP address [{URL}]")
    trace.add_argument("--steps", type=int, default=200, metavar="N", help="steps to trace, at most 4096 [200]")
    trace.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds to wait for them, at most 300 [60]"
    )
    trace.add_argument(
        "--load",
        metavar="CxIxO",
        help="requests at once x prompt tokens x output tokens to send meanwhile [none; 16x128x64 with MODEL]",
    )
    trace.add_argument("--seed", type=int, default=0, metavar="X", help="seed of the load's prompts [0]")
    trace.add_argument("--api-key", metavar="KEY", help="the server's key [$STAGEMESH_API_KEY]")
    trace.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to; made where missing")
    add_flags(trace.add_argument_group("with MODEL: how it is served"), ServeSettings, leave_out=OURS)


def run(namespace: argparse.Namespace) -> int:
    """Runs `bench trace`. Raises StagemeshError."""
    from stagemesh.bench.trace import TraceOptions, run

    settings = {k: v for k, v in given(namespace, ServeSettings).items() if k not in OURS}
    if namespace.model is not None and namespace.url is not None:
        raise ConfigError("give MODEL, to start a mesh, or --url, to trace a running one; not both")
    if namespace.model is None and settings:
        raise ConfigError(
            f"--{min(settings).replace('_', '-')} says how a mesh is served, and none is started: give MODEL "
            "('demo' for the one that ships)"
        )
    serve_flags = None
    if namespace.model is not None:
        model = str(DEMO_MODEL) if namespace.model == "demo" else namespace.model
        serve_flags = [model, "--port", "0", "--grpc-port", "0", *_as_flags(settings)]
    return run(
        TraceOptions(
            url=namespace.url or URL,
            serve_flags=serve_flags,
            steps=namespace.steps,
            timeout_s=namespace.timeout,
            load=namespace.load,
            seed=namespace.seed,
            api_key=namespace.api_key or os.environ.get("STAGEMESH_API_KEY"),
            out=namespace.out,
        )
    )


def _as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as flags of `serve`."""
    out = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        out.append(("--" if value else "--no-") + flag if isinstance(value, bool) else f"--{flag}={value}")
    return out
