"""How pipelines share stages: who holds a stage alone, and who holds it for several. Pure.

A stage with as many replicas as there are pipelines has a worker for each; one with fewer is shared, by those that have
the fewest pipelines on it first. All pipelines have the same layer ranges, so a worker holds one range for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .placement import place
from .planning import CannotForm, Choice, Target, candidates_of, refused_at
from .values import Range, StagePlan, Worker


def holders(others: Sequence[Sequence[StagePlan]], workers: Mapping[str, Worker]) -> dict[int, list[str]]:
    """Stage -> workers that other pipelines have there and that stay, the one with the fewest pipelines first.

    `others`: the stages of each; those of workers that drain or are gone do not count.
    """
    counts: dict[int, dict[str, int]] = {}
    for stages in others:
        for plan in stages:
            worker = workers.get(plan.worker_id)
            if worker is not None and worker.info.incarnation == plan.incarnation and not worker.draining:
                at = counts.setdefault(plan.stage, {})
                at[plan.worker_id] = at.get(plan.worker_id, 0) + 1
    return {stage: sorted(at, key=lambda name: at[name]) for stage, at in counts.items()}


def pinned(held: Mapping[int, Sequence[str]], replicas: Sequence[int], previous: Sequence[StagePlan]) -> dict[int, str]:
    """Stage -> the worker that a pipeline is to share there; where it may have one of its own, nothing.

    `held`: what the others have (see `holders`). `previous`: its own stages, whose workers it keeps if they are shared.
    """
    own = {plan.stage: plan.worker_id for plan in previous}
    found: dict[int, str] = {}
    for stage, names in held.items():
        if len(names) >= replicas[stage]:
            found[stage] = own[stage] if own.get(stage) in names else names[0]
    return found


def choose_beside(
    target: Target,
    free: Sequence[Worker],
    shared: Mapping[int, Worker],
    ranges: Sequence[Range],
    previous: Sequence[StagePlan],
) -> list[Choice]:
    """Who holds what, beside pipelines that have the same `ranges`: `shared` workers, and for the other stages `free`
    ones. Raises CannotForm."""
    workers = [w for w in free if w not in shared.values()] + list(shared.values())
    bound = {worker.info.worker_id: stage for stage, worker in shared.items()}
    candidates = [replace(c, pool=bound.get(c.worker_id, c.pool)) for c in candidates_of(workers)]
    own = {plan.stage: plan.worker_id for plan in previous}
    own |= {stage: worker.info.worker_id for stage, worker in shared.items()}
    placed = place(target.num_stages, candidates, ranges=ranges, holders=own, refused=refused_at(workers, ranges))
    if placed.missing:
        lacks = ", ".join(map(str, placed.missing))
        raise CannotForm(f"no worker is left for another replica of stage {lacks}", final=False)
    tight = [s for s in range(target.num_stages) if not target.cost.fits(placed.workers[s].kind, *ranges[s])]
    if tight:
        name = placed.workers[tight[0]].worker_id
        raise CannotForm(f"worker {name} has too little memory for the layers of stage {tight[0]}")
    by_id = {worker.info.worker_id: worker for worker in workers}
    return [Choice(by_id[placed.workers[s].worker_id], ranges[s]) for s in range(target.num_stages)]
