"""Advises which layer ranges, or which other worker, would be faster. Pure.

The cost model knows the relative costs of layers, and how long a device should take for them. The real time of a stage
also depends on what else runs on its machine. So the ratio of each stage's measured step to its predicted one counts as
a property of its worker, and predictions for other ranges use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stagemesh.errors import ConfigError
from stagemesh.planning.cost import CostModel, Kind
from stagemesh.planning.partition import partition
from stagemesh.protos.v1.coordinator_pb2 import RegisterRequest

from ..values import Range
from .kinds import kinds

GAIN = 0.10
"""Share of the slowest stage's time that a change must save to be worth it."""


@dataclass(frozen=True)
class Advice:
    """Ranges, and the seconds that the slowest stage takes now (`now_s`) and would take with them (`then_s`)."""

    ranges: tuple[Range, ...]
    now_s: float
    then_s: float

    @property
    def gain(self) -> float:
        """Share of the slowest stage's time that would be saved."""
        return 1 - self.then_s / self.now_s


def advise(cost: CostModel, workers: Sequence[Kind], ranges: Sequence[Range], seconds: Sequence[float]) -> Advice:
    """The best ranges for workers of these kinds. `seconds`: measured time of a step on each stage.

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
    """A spare worker that would be faster than one that holds a stage."""

    spare: str
    member: str
    faster: float
    """How many times as fast the slowest stage would be, by the devices' measured rates."""


def better_worker(
    cost: CostModel, members: Sequence[RegisterRequest], ranges: Sequence[Range], spare: Sequence[RegisterRequest]
) -> Better | None:
    """The best exchange of one worker, with the ranges partitioned again. None if no exchange is worth it."""
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
