"""`stagemesh plan`: whether a model fits some workers, and what its stages would be, without starting anything."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from stagemesh.settings.loading import load
from stagemesh.settings.plan import PLANNED, PlanSettings

from .flags import add_flags, given

TEXT = "say whether a model fits some workers, who would hold which layers, and how fast that can be"


def add_parser(commands: Any) -> None:
    """Adds the command to the parser."""
    command = commands.add_parser("plan", help=TEXT, description=f"{TEXT.capitalize()}. config.json alone is enough.")
    command.add_argument("model", help="folder with config.json, and with the weights if they are there")
    add_flags(command, PlanSettings, leave_out=tuple(PlanSettings.model_fields.keys() - PLANNED))
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Prints the plan. Returns 0 if the model fits, else 1. Raises ConfigError and CheckpointError."""
    # Other commands need not wait for numpy.
    from stagemesh.checkpoint import describe, read_config
    from stagemesh.errors import UnsupportedModel
    from stagemesh.models.support import check_heads, check_supported, heads_to_divide
    from stagemesh.planning.devices import workers
    from stagemesh.planning.forecast import DoesNotFit, forecast
    from stagemesh.planning.table import lines

    devices = workers(namespace.workers)
    asked = {**given(namespace, PlanSettings), "pipeline_parallel_size": len(devices)}
    settings = load(PlanSettings, file=None, env={}, given=asked)
    config = read_config(settings.model)
    for size in dict.fromkeys(settings.tp_sizes):
        if heads := heads_to_divide(config):
            check_heads(heads, size)
    info = describe(settings.model)
    try:
        check_supported(config)
    except UnsupportedModel as e:
        print(f"stagemesh plan: this release does not serve it: {e.message}", file=sys.stderr)
    try:
        found = forecast(info, settings, devices)
    except DoesNotFit as e:
        print(json.dumps({"fits": False, "reason": str(e)}) if namespace.json else f"does not fit: {e}")
        return 1
    if namespace.json:
        print(json.dumps({"fits": True, **dataclasses.asdict(found)}, indent=1))
    else:
        print("\n".join(lines(found)))
    return 0
