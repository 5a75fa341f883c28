"""Places workers on stages. Workers that are left over are standbys.

A worker started for one stage (`--stage 1`) may hold only that stage; other workers may hold any. So bound workers are
placed first and free ones fill the gaps, which covers as many stages as possible. Among equals, the worker that already
holds the range keeps it: it need not read the weights again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stagemesh.planning.cost import Kind

from ..values import Range


@dataclass(frozen=True)
class Candidate:
    """A worker that may be placed."""

    worker_id: str
    pool: int
    kind: Kind
    kept: Range | None = None
    """Layers whose weights it has loaded."""
    any_stage: bool = False
    """Whether it may hold another stage if its own has a worker."""
    refusals: Mapping[tuple[int, Range], str] = field(default_factory=dict)
    """(stage, layers) that it cannot hold -> why."""
    unfit: str = ""
    """Why it cannot hold any layers of this model. Empty if it can."""


@dataclass(frozen=True)
class Placement:
    """Stage -> worker, the stages that no worker can take, and the workers left over."""

    workers: Mapping[int, Candidate]
    missing: tuple[int, ...]
    standby: tuple[Candidate, ...]


def place(
    num_stages: int,
    candidates: Sequence[Candidate],
    *,
    ranges: Sequence[Range] | None = None,
    holders: Mapping[int, str] | None = None,
    refused: frozenset[tuple[str, int]] = frozenset(),
    by_memory: bool = False,
) -> Placement:
    """Places `candidates` on the stages.

    `ranges`: the layer ranges, if they are known. `holders`: stage -> worker that holds it now. `refused`: further
    (worker, stage) pairs to avoid. `by_memory` prefers workers with more memory to faster ones.
    """
    holders = holders or {}
    by_stage: dict[int, Candidate] = {}

    def order(candidate: Candidate) -> tuple[object, ...]:
        size = candidate.kind.memory_bytes if by_memory else candidate.kind.speed
        return (-size, _natural(candidate.worker_id))

    free: dict[int, list[Candidate]] = {}  # pool -> candidates, best first
    for candidate in sorted(candidates, key=order):
        free.setdefault(candidate.pool, []).append(candidate)

    def may_take(candidate: Candidate, stage: int) -> bool:
        failed = ranges is not None and (stage, ranges[stage]) in candidate.refusals
        return not candidate.unfit and not failed and (candidate.worker_id, stage) not in refused

    def take(stage: int, pool: int, wanted: str | None = None) -> None:
        """Puts a free worker of `pool` on `stage`: the best one that has the stage's weights, else the best one."""
        able = (c for c in free.get(pool, ()) if wanted in (None, c.worker_id) and may_take(c, stage))
        if (best := next(able, None)) is not None:
            if ranges is not None and best.kept != ranges[stage]:
                best = next((c for c in able if c.kept == ranges[stage]), best)
            free[pool].remove(best)
            by_stage[stage] = best

    for stage in sorted(holders.keys() & range(num_stages)):  # present holders keep their stage
        for pool in (stage, -1):
            if stage not in by_stage:
                take(stage, pool, holders[stage])
    for bound in (True, False):
        for stage in range(num_stages):
            if stage not in by_stage:
                take(stage, stage if bound else -1)
    for stage in range(num_stages):  # if a bound worker can replace a free one, the free one moves to an empty stage
        if stage in by_stage:
            continue
        for other in [pool for pool, left in free.items() if left and pool in by_stage]:
            holder = by_stage[other]
            if holder.pool == -1 and may_take(holder, stage):
                before = by_stage.pop(other)
                take(other, other)
                if other in by_stage:
                    by_stage[stage] = before
                    break
                by_stage[other] = before
    missing = tuple(stage for stage in range(num_stages) if stage not in by_stage)
    return Placement(by_stage, missing, tuple(c for pool in free.values() for c in pool))


def _natural(name: str) -> tuple[object, ...]:
    """Sort key that puts stage-10 after stage-9."""
    digits = name[len(name.rstrip("0123456789")) :]
    return (name[: len(name) - len(digits)], int(digits or -1))
