"""The kinds of registered workers, by what they measured."""

from __future__ import annotations

from collections.abc import Sequence

from stagemesh.planning.cost import Kind
from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest

# Assumed rates of a rank that measured nothing.
NOMINAL_FLOPS_PER_S, NOMINAL_BYTES_PER_S = 2e11, 1e10
# Rates within this factor are one kind: measurements repeat no better, and a partition should not follow their noise.
SAME_KIND = 1.25


def kinds(workers: Sequence[RegisterRequest]) -> list[Kind]:
    """The kind of each worker. Rates within `SAME_KIND` of the slowest in a group count as that slowest rate.

    Workers on devices of one name count as fast as the fastest of them: a rate that a worker measured while others
    started says more about the start than about the device.
    """
    devices = [worker.device for worker in workers]
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for d in devices:
        flops_per_s, bytes_per_s = best.get((d.kind, d.name), (0.0, 0.0))
        best[d.kind, d.name] = max(flops_per_s, d.flops_per_s), max(bytes_per_s, d.bytes_per_s)
    rates = [best[d.kind, d.name] if d.name else (d.flops_per_s, d.bytes_per_s) for d in devices]

    def grouped(rates: list[float], nominal: float) -> dict[float, float]:
        of: dict[float, float] = {}
        floor = 0.0
        for rate in sorted(set(rates)):
            value = rate if rate > 0 else nominal
            if not floor or value > floor * SAME_KIND:
                floor = value
            of[rate] = floor
        return of

    flops = grouped([rate[0] for rate in rates], NOMINAL_FLOPS_PER_S)
    stream = grouped([rate[1] for rate in rates], NOMINAL_BYTES_PER_S)
    return [
        Kind(w.tp_size, w.device.memory_bytes, flops[rate[0]], stream[rate[1]], w.device.kind == "cpu")
        for w, rate in zip(workers, rates, strict=True)
    ]
