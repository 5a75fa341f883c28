"""When a stage has no worker and none comes back: those that are left take its layers over, in fewer stages.

They load what they lack, and every sequence is computed again: slower than with a worker to spare, but requests go on.
As soon as there are workers for all stages again, the pipeline moves to them while it serves (moving.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from . import values as v
from .pipeline import Pipeline, State
from .planning import CannotForm, Choice, choose
from .scaling import UP, Scaler


class Survivors(Scaler):
    """Pipelines with fewer stages than there should be."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._down_since: dict[str, float] = {}
        self._tried_fewer = -1
        """Membership version at which fewer stages were tried in vain."""

    def _form_if_due(self, pipeline: Pipeline) -> None:
        super()._form_if_due(pipeline)
        name = pipeline.pipeline_id
        if pipeline.state is not State.DOWN or pipeline.restored:
            self._down_since.pop(name, None)
            return
        since = self._down_since.setdefault(name, self._now)
        # One that never served waits for its workers: they are being started.
        if self._now < since + self.target.takeover_s or not pipeline.last_stages or self._tried_fewer == self._version:
            return
        if any(p.state in (*UP, State.FORMING) for p in self.pipelines.values()):
            return
        chosen = self._choose_fewer(pipeline)
        if not chosen:
            self._tried_fewer = self._version
            return
        self._log(f"{name} goes on with {len(chosen)} stages: nobody took the others' place", warning=True)
        self._assign(pipeline, chosen)

    def _choose_fewer(self, pipeline: Pipeline) -> list[Choice]:
        """As many stages as can be had, on workers of any pool, in the order in which they held layers; nobody, where
        none can hold the model."""
        free = self._free_for(pipeline)
        order = {plan.worker_id: plan.stage for plan in pipeline.last_stages}
        free.sort(key=lambda w: order.get(w.info.worker_id, w.info.pool))
        anywhere = [replace(w, info=replace(w.info, pool=-1), refusals={}) for w in free]
        by_id = {w.info.worker_id: w for w in free}
        for count in range(min(self.target.num_stages - 1, len(free)), 0, -1):
            fewer = replace(self.target, num_stages=count, layer_partition=None)
            previous = [
                v.StagePlan(stage, w.info.worker_id, w.info.incarnation, (0, 0), 0)
                for stage, w in enumerate(anywhere[:count])
            ]
            try:
                # Of another length than `previous`, so that ranges are cut anew and workers kept in order.
                chosen = choose(fewer, anywhere, [*previous, *pipeline.last_stages[count:]])
            except CannotForm:
                continue
            taken = [Choice(by_id[c.worker.info.worker_id], c.layers) for c in chosen]
            refused = any((s, c.layers) in c.worker.refusals for s, c in enumerate(taken))
            if not refused:
                return taken
        return []

    def _wanted(self, pipeline: Pipeline, leaving: Sequence[v.StagePlan]) -> tuple[list[Choice], str]:
        if self._is_short(pipeline) and not leaving:
            with suppress(CannotForm):
                chosen = choose(self.target, self._free_for(pipeline), pipeline.stages)
                return chosen, "there are workers for all stages again"
        return super()._wanted(pipeline, leaving)

    def _must_change(self, pipeline: Pipeline) -> bool:
        return self._is_short(pipeline)

    def _num_shares(self) -> int:
        # Beside one of fewer stages there is no other.
        return 1 if any(self._is_short(p) for p in self.pipelines.values()) else super()._num_shares()
