"""Measures how a mesh scales, with stages that sleep for a given time instead of computing.

    python -m benchmarks.scale grid [--stages 1,2,4] [--at-once 1,8,64] [--step-ms 20,3]
    python -m benchmarks.scale many [--requests 20000]
    python -m benchmarks.scale replicas
    python -m benchmarks.scale partition

`grid`: efficiency of the pipeline by concurrent requests and stages, and CPU time of gateway and coordinator per step,
token and worker. `many`: many short requests, which must be as fast at the end as at the start, in the same memory.
`replicas`: a second worker for the slowest stage while requests run. `partition`: the time that the coordinator needs
to place 400 layers on 1,000 workers of five kinds.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common.errors import BenchmarkError
from benchmarks.common.results import RESULTS, origin
from stagemesh.errors import StagemeshError

from . import many, partition, replicas, report
from .grid import grid


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _milliseconds(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _arguments(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How a mesh grows, with stages that sleep instead of computing.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    each = kinds.add_parser("grid", help="efficiency by stages and requests at once")
    each.add_argument("--stages", type=_numbers, default=[1, 2, 4, 8, 16, 32])
    each.add_argument("--at-once", type=_numbers, default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    each.add_argument("--step-ms", type=_milliseconds, default=[20.0, 3.0], help="milliseconds of each stage's sleep")
    each.add_argument("--window", type=float, default=8.0, help="seconds that each point is measured for")
    each.add_argument("--stream", action="store_true", help="clients read tokens as they come; else whole answers")
    short = kinds.add_parser("many", help="many short requests: same speed and memory at the end")
    short.add_argument("--requests", type=int, default=20000)
    short.add_argument("--at-once", type=int, default=32)
    short.add_argument("--max-tokens", type=int, default=4)
    short.add_argument("--step-ms", type=float, default=1.0)
    short.add_argument("--stream", action="store_true")
    second = kinds.add_parser("replicas", help="a second worker for the slowest stage while requests run")
    second.add_argument("--at-once", type=int, default=64)
    second.add_argument("--max-tokens", type=int, default=100)
    second.add_argument("--row-ms", type=float, default=4.0, help="milliseconds of a row over both stages")
    second.add_argument("--window", type=float, default=8.0, help="seconds that each point is measured for")
    second.add_argument("--pairs", type=int, default=3)
    placing = kinds.add_parser("partition", help="placing 400 layers on 1,000 workers")
    outs = ((each, "scale"), (short, "scale-many"), (second, "scale-replicas"), (placing, "scale-partition"))
    for kind, name in outs:
        kind.add_argument("--out", type=Path, default=RESULTS / name, help="results, without suffix")
    return parser.parse_args(None if argv is None else list(argv))


def main(argv: Iterable[str] | None = None) -> int:
    """Runs the command line. Returns 0 if the goals are met, 1 if not, 2 if nothing could be measured."""
    arguments = _arguments(argv)
    told = origin("scale " + " ".join(sys.argv[1:] if argv is None else list(argv)))
    try:
        with tempfile.TemporaryDirectory(prefix="stagemesh-scale-") as scratch:
            if arguments.kind == "grid":
                points = asyncio.run(grid(arguments, Path(scratch)))
                return report.write_grid(arguments.out, points, told)
            if arguments.kind == "many":
                return asyncio.run(many.run(arguments, Path(scratch), told))
            if arguments.kind == "replicas":
                return asyncio.run(replicas.run(arguments, Path(scratch), told))
            return partition.run(arguments.out, told)
    except (BenchmarkError, StagemeshError, TimeoutError, RuntimeError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
