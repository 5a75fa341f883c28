"""Chooses workers and layers for the stages of a pipeline: placement, then partition. Pure.

Pipelines may share stages. A stage with as many replicas as there are pipelines has one worker for each pipeline. A
stage with fewer is shared: workers in the fewest pipelines come first. All pipelines have the same layer ranges, so a
worker holds one range for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from stagemesh.errors import ConfigError
from stagemesh.planning.partition import partition

from ..values import Holder, Holders, Range, StagePlan
from .placement import Candidate, Placement, place
from .target import CannotForm, Target


def choose(target: Target, candidates: Sequence[Candidate], previous: Sequence[StagePlan]) -> Holders:
    """The worker and layers of each stage. `previous` stages keep their worker and layers if possible.

    Raises CannotForm.
    """
    holders = {plan.stage: plan.worker_id for plan in previous}
    # With another number of stages, the previous stages are not the same stages.
    if len(previous) == target.num_stages:
        ranges = [plan.layers for plan in previous]
        candidates = [_where_needed(c, candidates, holders) for c in candidates]
        placed = place(target.num_stages, candidates, ranges=ranges, holders=holders)
        if not placed.missing and all(target.cost.fits(placed.workers[s].kind, *ranges[s]) for s in placed.workers):
            return _holders(placed, ranges)
    return _anew(target, candidates, holders)


def choose_in_order(
    target: Target, candidates: Sequence[Candidate], previous: Sequence[StagePlan], num_stages: int
) -> Holders:
    """`num_stages` stages on candidates of any pool, in the candidates' order if possible.

    If there are as many `previous` stages, they keep their layers; otherwise the layers are partitioned again. Raises
    CannotForm.
    """
    fewer = replace(target, num_stages=num_stages, layer_partition=None)
    anywhere = [replace(c, pool=-1) for c in candidates]
    if len(previous) == num_stages:
        return choose(fewer, anywhere, previous)
    return _anew(fewer, anywhere, {stage: c.worker_id for stage, c in enumerate(anywhere[:num_stages])})


def _holders(placed: Placement, ranges: Sequence[Range]) -> Holders:
    return tuple(Holder(placed.workers[stage].worker_id, layers) for stage, layers in enumerate(ranges))


def _where_needed(candidate: Candidate, all_: Sequence[Candidate], holders: Mapping[int, str]) -> Candidate:
    """The candidate, unbound from its pool if it may hold any stage and its own stage is not free for it.

    That is so if it holds another stage, or if another worker that is there holds its own stage.
    """
    holder = holders.get(candidate.pool)
    elsewhere = any(name == candidate.worker_id and stage != candidate.pool for stage, name in holders.items())
    taken = holder not in (None, candidate.worker_id) and any(c.worker_id == holder for c in all_)
    return replace(candidate, pool=-1) if candidate.any_stage and (elsewhere or taken) else candidate


def choose_apart(
    target: Target,
    candidates: Sequence[Candidate],
    previous: Sequence[StagePlan],
    apart: Collection[frozenset[str]],
    away: Collection[str] = (),
) -> Holders:
    """Like `choose`, but avoids workers in `away`, and pairs in `apart` as neighbours, if possible.

    Raises CannotForm.
    """
    if away:
        here = [c for c in candidates if c.worker_id not in away]
        with contextlib.suppress(CannotForm):
            return choose_apart(target, here, previous, apart)
    chosen = choose(target, candidates, previous)
    for pair in _neighbours(chosen) & set(apart):
        # Replace the receiver first: the sender has the journal that refills the receiver's stage.
        for name in [holder.worker_id for holder in reversed(chosen) if holder.worker_id in pair]:
            with contextlib.suppress(CannotForm):
                other = choose(target, [c for c in candidates if c.worker_id != name], previous)
                if not _neighbours(other) & set(apart):
                    return other
    return chosen


def _neighbours(chosen: Holders) -> set[frozenset[str]]:
    """Pairs of workers with a link between them: each stage and the next, the last and the first."""
    names = [holder.worker_id for holder in chosen]
    return {frozenset(pair) for pair in zip(names, names[1:] + names[:1], strict=True) if pair[0] != pair[1]}


def shared_holders(others: Sequence[Sequence[StagePlan]], staying: Collection[tuple[str, int]]) -> dict[int, list[str]]:
    """Stage -> workers of other pipelines on it, those in the fewest pipelines first.

    `others`: the stages of each other pipeline. `staying`: (worker, incarnation) of the workers that count: those that
    do not drain.
    """
    counts: dict[int, dict[str, int]] = {}
    for stages in others:
        for plan in stages:
            if (plan.worker_id, plan.incarnation) in staying:
                at = counts.setdefault(plan.stage, {})
                at[plan.worker_id] = at.get(plan.worker_id, 0) + 1
    return {stage: sorted(at, key=lambda name: at[name]) for stage, at in counts.items()}


def pinned(held: Mapping[int, Sequence[str]], replicas: Sequence[int], previous: Sequence[StagePlan]) -> dict[int, str]:
    """Stage -> the worker that a pipeline must share there. Stages where it may have its own worker are left out.

    `held`: the other pipelines' workers (see `shared_holders`). `replicas`: number of workers that each stage should
    have. `previous`: the pipeline's own stages. It keeps their workers where these are shared.
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
    """The worker and layers of each stage of a pipeline that shares workers with others of the same `ranges`.

    `shared`: stage -> the worker to share there. `free`: candidates for the other stages. Raises CannotForm.
    """
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
    return _holders(placed, ranges)


def _anew(target: Target, candidates: Sequence[Candidate], holders: Mapping[int, str]) -> Holders:
    """Places and partitions without previous layers. If a worker has refused its range, repeats without it there."""
    by_id = {c.worker_id: c for c in candidates}
    refused: set[tuple[str, int]] = set()
    while True:
        placed = place(target.num_stages, candidates, holders=holders, refused=frozenset(refused))
        if placed.missing:
            raise _missing(target, placed, by_id, refused)
        try:
            ranges = _cut(target, placed)
        except ConfigError as e:
            roomy = place(target.num_stages, candidates, refused=frozenset(refused), by_memory=True)
            try:
                placed, ranges = roomy, _cut(target, roomy)
            except ConfigError:
                raise CannotForm(e.message) from e
        chosen = _holders(placed, ranges)
        again = {
            (holder.worker_id, stage)
            for stage, holder in enumerate(chosen)
            if (stage, holder.layers) in by_id[holder.worker_id].refusals
        }
        if not again:
            return chosen
        refused |= again


def _cut(target: Target, placed: Placement) -> list[Range]:
    stage_kinds = [placed.workers[stage].kind for stage in range(target.num_stages)]
    return partition(target.cost, stage_kinds, target.layer_partition)


def _missing(
    target: Target, placed: Placement, by_id: Mapping[str, Candidate], refused: Collection[tuple[str, int]]
) -> CannotForm:
    refusals = [c.unfit for _, c in sorted(by_id.items()) if c.unfit and (c.pool < 0 or c.pool in placed.missing)]
    refusals += [
        f"stage {stage}: {reason}"
        for name, candidate in sorted(by_id.items())
        for (stage, _), reason in candidate.refusals.items()
        if stage in placed.missing and (name, stage) in refused
    ]
    if refusals:
        return CannotForm("; ".join(refusals))
    stages = ("stage " if len(placed.missing) == 1 else "stages ") + ", ".join(map(str, placed.missing))
    verb = "has" if len(placed.missing) == 1 else "have"
    spare = [c for c in placed.standby if c.pool >= 0]
    hint = f"start one with `stagemesh stage --stage {placed.missing[0]}`"
    if spare:
        hint += f"; left over: {', '.join(f'{c.worker_id} (bound to stage {c.pool})' for c in spare[:3])}"
    count = f"{len(by_id)} registered, {target.num_stages} stages"
    return CannotForm(f"{stages} {verb} no worker ({count}): {hint}", final=False)
