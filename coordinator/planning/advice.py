"""Which layer ranges, or which other worker, would be faster. Pure.

The cost model knows what layers cost relative to each other, and what a device should take for them. What a stage
really takes also depends on what else runs there. So each stage's measured step is set against its predicted one, and
the ratio is taken for a property of its worker: other ranges are then predicted with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stagemesh.errors import ConfigError
from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest

from ..values import Range
from .cost import CostModel, Kind, kinds
from .partition import partition

GAIN = 0.10
"""So much faster the slowest stage has to become for a change to be worth it."""


@dataclass(frozen=True)
class Advice:
    """Ranges, and what the slowest stage takes now and would take with them, in seconds."""

    ranges: tuple[Range, ...]
    now_s: float
    then_s: float

    @property
    def gain(self) -> float:
        """Share of the slowest stage's time that would be saved."""
        return 1 - self.then_s / self.now_s


def advise(cost: CostModel, workers: Sequence[Kind], ranges: Sequence[Range], seconds: Sequence[float]) -> Advice:
    """The best ranges for workers of these kinds whose stages were measured to take `seconds` a step.

    Raises ConfigError when nothing fits.
    """
    as_measured = []
    for kind, (first, last), measured_s in zip(workers, ranges, seconds, strict=True):
        slower = measured_s / cost.stage_seconds(kind, first, last)
        as_measured.append(replace(kind, flops_per_s=kind.flops_per_s / slower, bytes_per_s=kind.bytes_per_s / slower))
    found = partition(cost, as_measured)
    then_s = max(cost.stage_seconds(kind, *r) for kind, r in zip(as_measured, found, strict=True))
    now_s = max(seconds)
    if then_s >= now_s:
        return Advice(tuple(ranges), now_s, now_s)
    return Advice(tuple(found), now_s, then_s)


@dataclass(frozen=True)
class Better:
    """A worker that holds nothing and would do better than one that holds a stage."""

    spare: str
    member: str
    faster: float
    """How many times as fast the slowest stage would be, by what the devices measured."""


def better_worker(
    cost: CostModel, members: Sequence[RegisterRequest], ranges: Sequence[Range], spare: Sequence[RegisterRequest]
) -> Better | None:
    """The best exchange of one worker, with ranges to suit; None where none is worth it."""
    every = kinds([*members, *spare])
    of_members = every[: len(members)]
    now_s = max(cost.stage_seconds(kind, *r) for kind, r in zip(of_members, ranges, strict=True))
    best: Better | None = None
    for info, kind in zip(spare, every[len(members) :], strict=True):
        for stage, member in enumerate(members):
            if kind.speed <= of_members[stage].speed or info.pool not in (-1, stage):
                continue
            changed = [*of_members[:stage], kind, *of_members[stage + 1 :]]
            try:
                found = partition(cost, changed)
            except ConfigError:
                continue
            faster = now_s / max(cost.stage_seconds(k, *r) for k, r in zip(changed, found, strict=True))
            if faster * (1 - GAIN) >= 1 and (best is None or faster > best.faster):
                best = Better(info.worker_id, member.worker_id, faster)
    return best
