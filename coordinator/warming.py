"""Which standby keeps which stage's weights in memory, so that it can take the stage's place at once. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .values import Range, StagePlan, Worker


def copies(stages: Sequence[StagePlan], standbys: Sequence[Worker]) -> dict[str, Range]:
    """Worker -> the layers it shall have loaded.

    Who has a stage's layers already keeps them. The others take the stage with the fewest copies, of those the one
    that they were started for, else the one with the most layers, as far as their pool allows and they have not failed
    to load it.
    """
    wanted: dict[str, Range] = {}
    count: Counter[int] = Counter()

    def able(worker: Worker, plan: StagePlan) -> bool:
        return worker.info.may_hold(plan.stage) and (plan.stage, plan.layers) not in worker.refusals

    for worker in standbys:
        kept = next((plan for plan in stages if plan.layers == worker.kept and able(worker, plan)), None)
        if kept is not None:
            wanted[worker.info.worker_id] = kept.layers
            count[kept.stage] += 1
    for worker in standbys:
        if worker.info.worker_id in wanted:
            continue
        choice = min(
            (plan for plan in stages if able(worker, plan)),
            key=lambda plan: (
                count[plan.stage],
                plan.stage != worker.info.pool,
                plan.layers[0] - plan.layers[1],
                plan.stage,
            ),
            default=None,
        )
        if choice is not None:
            wanted[worker.info.worker_id] = choice.layers
            count[choice.stage] += 1
    return wanted
