"""Which layer ranges would be faster, judged by what steps were measured to take. Pure; the clock is an argument.

The cost model knows what layers cost relative to each other, and what a device should take for them; what a stage
really takes also depends on what else runs there. So each stage's measured step is set against its predicted one, and
the ratio is taken for a property of its worker: other ranges are then predicted with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stagemesh.errors import ConfigError

from .cost import CostModel, Kind, kinds
from .partition import partition
from .values import Range, WorkerInfo

FRESH_S = 8.0
"""A report this old says nothing of now."""
LOOK_S = 5.0
"""Between two looks at whether other ranges would be better."""
GAIN = 0.10
"""So much faster the slowest stage has to become for layers to move by themselves,"""
TIMES = 3
"""in so many looks one after the other,"""
REST_S, LONGER_REST_S = 60.0, 600.0
"""and not again before so long; longer where the last time brought less than half of that."""
KEPT = 16


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
    cost: CostModel, members: Sequence[WorkerInfo], ranges: Sequence[Range], spare: Sequence[WorkerInfo]
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


@dataclass
class Outcome:
    """A change of ranges, what was expected of it and what came."""

    epoch: int
    before_s: float
    expected_s: float
    after_s: float = 0.0
    """0: not measured yet."""


class StepTimes:
    """What gateways report of one pipeline's steps."""

    def __init__(self) -> None:
        self._epoch = 0
        self._reports: dict[str, tuple[float, list[float]]] = {}
        self.outcomes: deque[Outcome] = deque(maxlen=KEPT)
        self._looked_at = self._moved_at = 0.0
        self._better = 0

    def note(self, gateway_id: str, epoch: int, seconds: list[float], now: float) -> None:
        """Seconds that a decode step takes on each stage."""
        if epoch < self._epoch:
            return
        if epoch > self._epoch:
            self._epoch = epoch
            self._reports.clear()
        self._reports[gateway_id] = now, seconds
        latest = self.outcomes[-1] if self.outcomes else None
        if latest is not None and latest.epoch == epoch:
            latest.after_s = max(seconds)

    def seconds(self, epoch: int, stages: int, now: float) -> list[float] | None:
        """The mean over the gateways, of now; None while nothing is known."""
        fresh = [s for at, s in self._reports.values() if now - at <= FRESH_S and len(s) == stages and min(s) > 0]
        if epoch != self._epoch or not fresh:
            return None
        return [sum(column) / len(fresh) for column in zip(*fresh, strict=True)]

    def due(self, now: float) -> bool:
        """Whether to look again."""
        if now < self._looked_at + LOOK_S:
            return False
        self._looked_at = now
        return True

    def judge(self, advice: Advice, now: float) -> bool:
        """Whether layers are to move by themselves: much is gained, for some time, and nothing moved of late."""
        self._better = self._better + 1 if advice.gain >= GAIN else 0
        last = self.outcomes[-1] if self.outcomes else None
        in_vain = last is not None and last.after_s > last.before_s * (1 - GAIN / 2)
        return self._better >= TIMES and now >= self._moved_at + (LONGER_REST_S if in_vain else REST_S)

    def rest(self, now: float) -> None:
        """Layers could not move: not again for long."""
        self._better, self._moved_at = 0, now + LONGER_REST_S - REST_S

    def moved(self, epoch: int, advice: Advice, now: float) -> None:
        """The pipeline has gone to these ranges."""
        self._better, self._moved_at = 0, now
        self.outcomes.append(Outcome(epoch, advice.now_s, advice.then_s))
