"""From the registered workers to the stages of a pipeline: placement, then partition, and the links' transport."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from stagemesh.errors import ConfigError

from .cost import CostModel, kinds
from .partition import partition
from .placement import Candidate, Placement, place
from .values import Limits, Range, StagePlan, Worker, WorkerInfo


class CannotForm(Exception):
    """No pipeline can be formed from the workers there are; the text says why and what would help."""

    def __init__(self, reason: str, *, final: bool = True) -> None:
        """`final`: waiting will not help; settings, model or workers must change."""
        super().__init__(reason)
        self.final = final


@dataclass(frozen=True)
class Target:
    """What is to be built."""

    cost: CostModel
    num_stages: int
    limits: Limits
    fingerprint: str
    layer_partition: tuple[int, ...] | None = None
    transport: str = "auto"
    terms: str = ""
    """Digest of model and bounds."""
    takeover_s: float = 15.0
    """How long a lost stage waits for a worker, before the others take its layers over."""
    rebalance: bool = False
    """Layers move by themselves when steps would be faster for it."""


@dataclass(frozen=True)
class Choice:
    """A worker and the layers it shall hold."""

    worker: Worker
    layers: Range


def choose(target: Target, workers: Sequence[Worker], previous: Sequence[StagePlan]) -> list[Choice]:
    """Who holds what, in stage order. `previous` stages keep their worker and layers where they can.

    Raises CannotForm.
    """
    by_id = {worker.info.worker_id: worker for worker in workers}
    candidates = candidates_of(workers)
    holders = {plan.stage: plan.worker_id for plan in previous}
    # Of another number of stages none is the same one.
    old = [plan.layers for plan in previous] if len(previous) == target.num_stages else None
    if old is not None:
        candidates = [_where_needed(c, by_id, holders) for c in candidates]
        refused = refused_at(workers, old)
        placed = place(target.num_stages, candidates, ranges=old, holders=holders, refused=refused)
        fit = all(target.cost.fits(placed.workers[s].kind, *old[s]) for s in placed.workers)
        if not placed.missing and fit:
            return [Choice(by_id[placed.workers[s].worker_id], old[s]) for s in range(target.num_stages)]
    return _anew(target, by_id, candidates, holders)


def candidates_of(workers: Sequence[Worker]) -> list[Candidate]:
    """The workers as placement sees them."""
    return [
        Candidate(worker.info.worker_id, worker.info.pool, kind, worker.kept)
        for worker, kind in zip(workers, kinds([w.info for w in workers]), strict=True)
    ]


def _where_needed(candidate: Candidate, workers: Mapping[str, Worker], holders: Mapping[int, str]) -> Candidate:
    """One that may hold any stage is bound to none where it holds another one, or its own is held by another worker."""
    holder = holders.get(candidate.pool)
    elsewhere = any(name == candidate.worker_id and s != candidate.pool for s, name in holders.items())
    spare = holder is not None and holder != candidate.worker_id and holder in workers
    if workers[candidate.worker_id].info.any_stage and (elsewhere or spare):
        return replace(candidate, pool=-1)
    return candidate


def refused_at(workers: Sequence[Worker], ranges: Sequence[Range]) -> frozenset[tuple[str, int]]:
    """(worker, stage) that failed for good with the stage's range."""
    return frozenset(
        (worker.info.worker_id, stage)
        for worker in workers
        for stage, layers in enumerate(ranges)
        if (stage, layers) in worker.refusals
    )


def choose_apart(
    target: Target,
    workers: Sequence[Worker],
    previous: Sequence[StagePlan],
    apart: Collection[frozenset[str]],
    away: Collection[str] = (),
) -> list[Choice]:
    """`choose`, without workers that are `away`, and without two in `apart` next to each other, where that can be had.
    Raises CannotForm."""
    if away:
        here = [w for w in workers if w.info.worker_id not in away]
        with contextlib.suppress(CannotForm):
            return choose_apart(target, here, previous, apart)
    chosen = choose(target, workers, previous)
    for pair in _neighbours(chosen) & set(apart):
        # The receiver first: what it has to be refilled with lies with the sender.
        for name in [c.worker.info.worker_id for c in reversed(chosen) if c.worker.info.worker_id in pair]:
            try:
                other = choose(target, [w for w in workers if w.info.worker_id != name], previous)
            except CannotForm:
                continue
            if not _neighbours(other) & set(apart):
                return other
    return chosen


def _neighbours(chosen: Sequence[Choice]) -> set[frozenset[str]]:
    """Workers with a link between them: each stage and the next, the last and the first."""
    names = [choice.worker.info.worker_id for choice in chosen]
    return {frozenset(pair) for pair in zip(names, names[1:] + names[:1], strict=True) if pair[0] != pair[1]}


def _anew(
    target: Target, by_id: dict[str, Worker], candidates: list[Candidate], holders: dict[int, str]
) -> list[Choice]:
    """A fresh partition; a worker that refused what falls to it is left out for that stage, and it is tried again."""
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
        chosen = [Choice(by_id[placed.workers[s].worker_id], layers) for s, layers in enumerate(ranges)]
        again = {
            (choice.worker.info.worker_id, stage)
            for stage, choice in enumerate(chosen)
            if (stage, choice.layers) in choice.worker.refusals
        }
        if not again:
            return chosen
        refused |= again


def _cut(target: Target, placed: Placement) -> list[Range]:
    stage_kinds = [placed.workers[stage].kind for stage in range(target.num_stages)]
    return partition(target.cost, stage_kinds, target.layer_partition)


def _missing(target: Target, placed: Placement, by_id: dict[str, Worker], refused: set[tuple[str, int]]) -> CannotForm:
    refusals = [
        f"stage {stage}: {reason}"
        for name, worker in sorted(by_id.items())
        for (stage, _), reason in worker.refusals.items()
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


def transport(wanted: str, sender: WorkerInfo, receiver: WorkerInfo, *, ucx_failed: str = "") -> tuple[str, str]:
    """The transport of a link, and a warning where it is not the best one.

    `ucx_failed`: why UCX between these two did not work before. Raises CannotForm when they have none in common.
    """

    def lacks(name: str) -> list[str]:
        return [w.worker_id for w in (sender, receiver) if w.addresses(name) is None]

    if wanted in ("auto", "ucx") and not lacks("ucx") and not (ucx_failed and wanted == "auto"):
        return "ucx", ""
    if wanted == "ucx":
        raise CannotForm(
            f"--transport ucx, but {' and '.join(lacks('ucx'))} did not open it: install the extra ucx-cu12 or "
            "ucx-cu13 there (its log says what failed), or use --transport auto"
        )
    if lacks("tcp"):
        raise CannotForm(
            f"workers {sender.worker_id} and {receiver.worker_id} have no transport in common: "
            f"{' and '.join(lacks('tcp'))} did not open tcp; start them with --transport auto"
        )
    if wanted == "tcp":
        return "tcp", ""
    why = ucx_failed or f"{' and '.join(lacks('ucx'))} did not open ucx (its log says why)"
    return "tcp", f"link {sender.worker_id} -> {receiver.worker_id} falls back from ucx to tcp, which is slower: {why}"
