"""How pipelines share stages: who holds a stage alone, and who holds it for several. Pure.

A stage with as many replicas as there are pipelines has a worker for each. A stage with fewer is shared: the workers
with the fewest pipelines come first. All pipelines have the same layer ranges, so a worker holds one range for all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from ..values import Holder, Holders, Range, StagePlan
from .placement import Candidate, place
from .target import CannotForm, Target


def shared_holders(others: Sequence[Sequence[StagePlan]], staying: Collection[tuple[str, int]]) -> dict[int, list[str]]:
    """Stage -> workers that other pipelines have there, the one with the fewest pipelines first.

    `others`: the stages of each other pipeline. `staying`: (worker, incarnation) of workers that do not drain; others
    do not count.
    """
    counts: dict[int, dict[str, int]] = {}
    for stages in others:
        for plan in stages:
            if (plan.worker_id, plan.incarnation) in staying:
                at = counts.setdefault(plan.stage, {})
                at[plan.worker_id] = at.get(plan.worker_id, 0) + 1
    return {stage: sorted(at, key=lambda name: at[name]) for stage, at in counts.items()}


def pinned(held: Mapping[int, Sequence[str]], replicas: Sequence[int], previous: Sequence[StagePlan]) -> dict[int, str]:
    """Stage -> the worker that a pipeline has to share there; stages where it may have its own are left out.

    `held`: what the others have (see `shared_holders`). `replicas`: workers that each stage is to have. `previous`: the
    pipeline's own stages, whose workers it keeps where they are shared.
    """
    own = {plan.stage: plan.worker_id for plan in previous}
    found: dict[int, str] = {}
    for stage, names in held.items():
        if len(names) >= replicas[stage]:
            found[stage] = own[stage] if own.get(stage) in names else names[0]
    return found


def choose_beside(
    target: Target,
    free: Sequence[Candidate],
    shared: Mapping[int, Candidate],
    ranges: Sequence[Range],
    previous: Sequence[StagePlan],
) -> Holders:
    """Who holds what beside pipelines that have the same `ranges`: `shared` workers, and `free` ones for the other
    stages. Raises CannotForm."""
    bound = {candidate.worker_id: stage for stage, candidate in shared.items()}
    both = [c for c in free if c.worker_id not in bound] + list(shared.values())
    candidates = [replace(c, pool=bound.get(c.worker_id, c.pool)) for c in both]
    own = {plan.stage: plan.worker_id for plan in previous} | {s: c.worker_id for s, c in shared.items()}
    placed = place(target.num_stages, candidates, ranges=ranges, holders=own)
    if placed.missing:
        lacks = ", ".join(map(str, placed.missing))
        raise CannotForm(f"no worker is left for another replica of stage {lacks}", final=False)
    tight = [s for s in range(target.num_stages) if not target.cost.fits(placed.workers[s].kind, *ranges[s])]
    if tight:
        name = placed.workers[tight[0]].worker_id
        raise CannotForm(f"worker {name} has too little memory for the layers of stage {tight[0]}")
    return tuple(Holder(placed.workers[s].worker_id, ranges[s]) for s in range(target.num_stages))
