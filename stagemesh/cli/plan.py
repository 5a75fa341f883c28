"""`stagemesh plan`: whether a model fits some workers, and what its stages would be, without starting anything."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stagemesh.checkpoint import describe, read_config, read_configs
from stagemesh.errors import UnsupportedModel
from stagemesh.models.quantization import refuse_quantized
from stagemesh.models.support import check_heads, check_supported, heads_to_divide
from stagemesh.planning.devices import workers
from stagemesh.planning.forecast import DoesNotFit, Forecast, forecast
from stagemesh.planning.partition import GIB
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
        refuse_quantized(Path(settings.model), read_configs(settings.model))
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
        print("\n".join(_lines(found)))
    return 0


HEAD = ("stage", "worker", "layers", "weights", "KV/token", "KV tokens", "1 row")
WIDTHS = (5, 18, 8, 10, 9, 10, 9, 9)


def _lines(plan: Forecast) -> Iterator[str]:
    """The plan for people, within 80 columns."""
    weights = sum(stage.weight_bytes * stage.tensor_parallel_size for stage in plan.stages) / GIB
    yield f"{plan.layers} layers, {_count(plan.parameters)} parameters, {weights:.1f} GiB of weights over all ranks"
    yield ""
    yield _row(*HEAD, f"{plan.rows} row{'s' if plan.rows > 1 else ''}")
    for s in plan.stages:
        yield _row(
            f"{s.stage}{'*' if s.stage == plan.bottleneck else ' '}",
            s.worker if s.tensor_parallel_size == 1 else f"{s.tensor_parallel_size}x {s.worker}",
            f"{s.first_layer}-{s.last_layer}",
            f"{s.weight_bytes / GIB:.1f} GiB",
            f"{s.kv_bytes_per_token / 1024:.3g} KiB",
            str(s.kv_tokens),
            f"{s.row_s * 1e3:.3g} ms",
            f"{s.full_step_s * 1e3:.3g} ms",
        )
    yield ""
    yield f"{plan.sequences} sequences of {plan.max_model_len} tokens at once (--max-num-seqs {plan.max_num_seqs}),"
    yield f"{plan.steps_in_flight} step{'s' if plan.steps_in_flight > 1 else ''} in flight: at most {plan.tokens_per_s:.0f} tokens/s;"
    yield f"one short sequence alone: at most {plan.tokens_per_s_alone:.0f} tokens/s."
    yield "Weights and KV are those of one rank. * is the bottleneck. Times are bounds by"
    yield "data sheets of the devices: links and what goes on around a step take more."


def _row(*cells: str) -> str:
    return "".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"
