"""Standbys that load what they may have to take over, and stages that leave workers which drain."""

from __future__ import annotations

from . import values as v
from .forming import RETRY_MAX_S, Former, Pipeline, State
from .planning import CannotForm, choose
from .warming import copies


class Mover(Former):
    """Weights are loaded beside whatever is served; a pipeline changes only when its next workers have them."""

    def _warm_standbys(self) -> None:
        """Has standbys load what they may have to take over, once everything serves."""
        if any(p.state is not State.SERVING for p in self.pipelines.values()):
            return
        stages = [plan for p in self.pipelines.values() for plan in p.stages]
        members = {plan.worker_id for plan in stages}
        standbys = [w for name, w in self.workers.items() if name not in members and not w.draining]
        for name, layers in copies(stages, standbys).items():
            self._prepare(self.workers[name], layers)

    def _prepare(self, worker: v.Worker, layers: v.Range) -> None:
        if worker.kept != layers and worker.preparing is None and self._now >= worker.prepare_after:
            worker.preparing, worker.kept = layers, None
            info = worker.info
            self._act(v.Prepare(info.worker_id, info.incarnation, info.address, layers))

    def _prepared(self, event: v.Prepared | v.PrepareFailed) -> None:
        if not self.knows(event.worker_id, event.incarnation):
            return
        worker = self.workers[event.worker_id]
        if worker.preparing != event.layers:
            return  # It was given a stage meanwhile.
        worker.preparing = None
        if isinstance(event, v.Prepared) and event.fingerprint == self.target.fingerprint:
            worker.kept = event.layers
            self._log(f"worker {event.worker_id} has layers {event.layers[0]}-{event.layers[1] - 1} ready")
        elif isinstance(event, v.PrepareFailed) and not event.final:
            worker.prepare_after = self._now + RETRY_MAX_S
            self._log(f"worker {event.worker_id} has not loaded layers {event.layers}: {event.reason}", warning=True)
        else:
            what = event.reason if isinstance(event, v.PrepareFailed) else "it has another revision of the checkpoint"
            reason = f"worker {event.worker_id} cannot load layers {event.layers[0]}-{event.layers[1] - 1}: {what}"
            self._log(reason, warning=True)
            for pipeline in self.pipelines.values():
                for plan in pipeline.stages:
                    if plan.layers == event.layers:
                        worker.refusals[plan.stage, plan.layers] = reason
        self._publish()

    def _move_if_due(self, pipeline: Pipeline) -> None:
        """Stages of workers that drain go to others, once these have loaded them; where there are none, what runs is
        finished and nothing new is taken."""
        if pipeline.state not in (State.SERVING, State.DRAINING):
            return
        leaving = [plan for plan in pipeline.stages if self._worker_at(pipeline, plan.stage).draining]
        if not leaving:
            return
        state, reason = State.SERVING, ""
        try:
            chosen = choose(self.target, self._free_for(pipeline), pipeline.stages)
        except CannotForm:
            state, reason = State.DRAINING, f"stage {leaving[0].stage}: worker {leaving[0].worker_id} drains"
        else:
            # One that holds another stage of it loads when that stage is given up.
            lacking = [
                c for c in chosen if c.worker.kept != c.layers and pipeline.stage_of(c.worker.info.worker_id) is None
            ]
            for choice in lacking:
                self._prepare(choice.worker, choice.layers)
            if not lacking:
                moves = ", ".join(f"stage {plan.stage} leaves worker {plan.worker_id}" for plan in leaving)
                self._interrupt(pipeline, f"{moves}, which drains")
                return
        if pipeline.state is not state:
            pipeline.state, pipeline.reason = state, reason
            self._publish()
