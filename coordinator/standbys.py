"""Standbys load what they may have to take over, and workers what they are going to hold."""

from __future__ import annotations

from . import actions, events
from . import values as v
from .forming import REFUSED_S, RETRY_MAX_S, Former
from .pipeline import State
from .warming import copies

REFILLED_S = 1.5
"""So long a pipeline that was just formed may compute what a lost stage had: on one machine that needs all cores."""


class Warmer(Former):
    """Weights are loaded beside whatever is served."""

    def _warm_standbys(self) -> None:
        """Has standbys load what they may have to take over, once everything serves."""
        states = {p.state for p in self.pipelines.values() if not p.leaving}
        # One that is down for want of workers does not keep the others' standbys waiting.
        if State.SERVING not in states or states & {State.FORMING, State.DRAINING}:
            return
        if self._now < max(p.serving_since for p in self.pipelines.values()) + REFILLED_S:
            return
        stages = [plan for p in self.pipelines.values() for plan in p.stages]
        members = {plan.worker_id for plan in stages}
        members |= self._promised()
        standbys = [w for name, w in self.workers.items() if name not in members and not w.draining]
        for name, layers in copies(stages, standbys).items():
            self._prepare(self.workers[name], layers)

    def _promised(self) -> set[str]:
        """Workers that load, or have loaded, what a pipeline is about to move to them."""
        return set()

    def _prepare(self, worker: v.Worker, layers: v.Range) -> None:
        if layers in (worker.kept, worker.beside) or worker.preparing is not None or self._now < worker.prepare_after:
            return
        worker.preparing, worker.beside = layers, None
        if not self.pipelines_of(worker.info.worker_id):
            worker.kept = None
        info = worker.info
        self._act(actions.Prepare(info.worker_id, info.incarnation, info.address, layers))

    def _prepared(self, event: events.Prepared | events.PrepareFailed) -> None:
        if not self.knows(event.worker_id, event.incarnation):
            return
        worker = self.workers[event.worker_id]
        if worker.preparing != event.layers:
            return  # It was given a stage meanwhile.
        worker.preparing = None
        if isinstance(event, events.Prepared) and event.fingerprint == self.target.fingerprint:
            if self.pipelines_of(event.worker_id):
                worker.beside = event.layers
            else:
                worker.kept = event.layers
            self._log(f"worker {event.worker_id} has layers {event.layers[0]}-{event.layers[1] - 1} ready")
        elif isinstance(event, events.PrepareFailed) and not event.final:
            worker.prepare_after = self._now + RETRY_MAX_S
            reason = f"worker {event.worker_id} has not loaded layers {event.layers}: {event.reason}"
            self._log(reason, warning=True)
            self._cannot_load(event.layers, reason, final=False)
        else:
            what = (
                event.reason if isinstance(event, events.PrepareFailed) else "it has another revision of the checkpoint"
            )
            reason = f"worker {event.worker_id} cannot load layers {event.layers[0]}-{event.layers[1] - 1}: {what}"
            self._log(reason, warning=True)
            for pipeline in self.pipelines.values():
                for plan in pipeline.stages:
                    if plan.layers == event.layers:
                        worker.refuse(plan.stage, plan.layers, reason, self._now + REFUSED_S)
            self._cannot_load(event.layers, reason, final=True)
        self._publish()

    def _cannot_load(self, layers: v.Range, reason: str, *, final: bool) -> None:
        """A worker has not; `final`: it never will."""
