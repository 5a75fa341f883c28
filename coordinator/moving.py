"""Pipelines whose layers change hands while they serve.

A move forms the next epoch of a pipeline beside the one that serves: the workers load what they lack, links are made,
among them those over which KV pages go from who holds a layer to who is going to hold it. Then gateways are told. Each
copies its pages, goes over between two steps and says so; when all have, the epoch before is over. Until gateways have
been told, a move that fails is forgotten, and nothing has happened. From then on its failure is the pipeline's, which
is made good like any other; and it is written down, so that a coordinator that is started again goes on with it: where
a gateway has gone over, the epoch before must not be driven any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stagemesh.protocol import MOVES

from . import actions, events
from . import values as v
from .forming import RETRY_MAX_S
from .pipeline import Phase, Pipeline, State, num_links
from .planning import CannotForm, Choice
from .wishes import Wishes

MOVE_S = 60.0
"""How long the workers may take to link, and then how long gateways may take to go over."""
GONE_S = 2.0
"""A gateway whose stream ended is waited for so long: it starts over often."""
VERDICT_S = 3.0
"""How long gateways may take to say that they stayed, when a move fails late."""
TRIES = 2
"""A move that failed so often is not tried again: a stage that drains goes the hard way, other ranges are given up."""


@dataclass
class Move(Pipeline):
    """The next epoch of a pipeline, while the one before serves."""

    why: str = ""
    copies: tuple[v.Copy, ...] = ()
    copied: set[int] = field(default_factory=set)
    """Copies whose link stands."""
    published: bool = False
    taken_up: bool = False
    """Published by a coordinator before this one: which gateways have gone over is not known."""
    moved: set[str] = field(default_factory=set)
    """Gateways that have gone over."""
    stayed: set[str] = field(default_factory=set)
    """Gateways that could not."""
    fault: str = ""
    """Why it is not to be, though gateways have been told."""
    counts: bool = True
    """Whether its failure says something of the next try: not, where a worker was lost."""
    deadline: float = 0.0


def pages_to_copy(old: Sequence[v.StagePlan], new: Sequence[v.StagePlan], epoch: int) -> tuple[v.Copy, ...]:
    """What has to go from worker to worker when the stages change; `epoch` is the old one's."""
    found: list[v.Copy] = []
    for to in new:
        for source in old:
            first, last = max(to.layers[0], source.layers[0]), min(to.layers[1], source.layers[1])
            if first < last and source.worker_id != to.worker_id:
                found.append(v.Copy(len(found), epoch, source.stage, to.stage, (first, last)))
    return tuple(found)


class Mover(Wishes):
    """Changes of a pipeline beside the pipeline."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.moves: dict[str, Move] = {}
        """By pipeline."""
        self._highest: dict[str, int] = {
            **(named.get("epochs") or {}),
            **{name: p.epoch for name, p in self.pipelines.items()},
        }
        """Pipeline -> the highest epoch that it, or a move of it, ever had."""
        self._failed: dict[str, int] = {}
        """Pipeline -> moves that failed in a row."""
        self._why_failed = ""
        self._wants: dict[str, set[str]] = {}
        """Pipeline -> workers that it is to move to, as they load or a move that failed is to be tried again."""
        self._move_after: dict[str, float] = {}
        self._gateways: dict[str, tuple[int, float]] = {}
        """Gateway -> streams, and when the last of them ended."""
        self._all_came_at = self._now + GONE_S if named.get("epochs") else self._now
        """When those that followed a coordinator before this one have come back: which they are is not known."""
        self._old_gateways: set[str] = set()
        """Those that know nothing of moves."""

    # -- what is to change ------------------------------------------------------------------------------------------

    def _repartition(self, ranges: tuple[v.Range, ...]) -> None:
        self._failed.clear()
        super()._repartition(ranges)

    def _rebalance_if_due(self, pipeline: Pipeline) -> None:
        if not self.moves:
            super()._rebalance_if_due(pipeline)

    def _move_if_due(self, pipeline: Pipeline) -> None:
        """Stages of workers that drain go to others, and layers to where they are wanted, once these have loaded them;
        where nobody can take a draining worker's, what runs is finished and nothing new is taken."""
        name = pipeline.pipeline_id
        if pipeline.state not in (State.SERVING, State.DRAINING):
            self._wants.pop(name, None)
            return
        if name in self.moves:
            self._move_on(pipeline, self.moves[name])
            return
        self._wants.pop(name, None)
        leaving = [plan for plan in pipeline.stages if self._worker_at(pipeline, plan.stage).draining]
        state, reason = State.SERVING, ""
        try:
            chosen, why = self._wanted(pipeline, leaving)
        except CannotForm:
            state, reason = State.DRAINING, f"stage {leaving[0].stage}: worker {leaving[0].worker_id} drains"
        else:
            beside = self._knows_moves(pipeline, chosen)
            lacking = [
                c
                for c in chosen
                if c.layers not in (c.worker.kept, c.worker.beside)
                # One that cannot load beside what it holds loads when that is over.
                and (beside or pipeline.stage_of(c.worker.info.worker_id) is None)
            ]
            self._wants[name] = {c.worker.info.worker_id for c in chosen}
            for choice in lacking:
                self._prepare(choice.worker, choice.layers)
            if chosen and not lacking and self._now >= self._move_after.get(name, 0.0):
                if beside and self._failed.get(name, 0) < TRIES:
                    self._begin(pipeline, chosen, why)
                elif leaving or not beside or self._must_change(pipeline):
                    self._move_hard(pipeline, chosen, why)
                else:
                    self._give_up(pipeline, f"{TRIES} moves failed, the last one because {self._why_failed}")
        if pipeline.state is not state and pipeline.state in (State.SERVING, State.DRAINING):
            pipeline.state, pipeline.reason = state, reason
            self._publish()

    def _promised(self) -> set[str]:
        return super()._promised().union(*self._wants.values())

    def _must_change(self, pipeline: Pipeline) -> bool:
        """Whether it is formed anew where moves fail, rather than left as it is."""
        return False

    def _give_up(self, pipeline: Pipeline, why: str) -> None:
        """What a pipeline was to move for will not be."""
        self._give_ranges_up(why)

    def _knows_moves(self, pipeline: Pipeline, chosen: Sequence[Choice]) -> bool:
        """Whether all whom it takes speak a protocol that has moves: not in the midst of an upgrade to it."""
        workers = [self._worker_at(pipeline, plan.stage) for plan in pipeline.stages] + [c.worker for c in chosen]
        return all(w.info.protocol >= MOVES for w in workers) and not self._followers() & self._old_gateways

    def _move_hard(self, pipeline: Pipeline, chosen: Sequence[Choice], why: str) -> None:
        """The pipeline is formed anew, and what its stages lack is computed again."""
        pipeline.last_stages = tuple(
            v.StagePlan(stage, c.worker.info.worker_id, c.worker.info.incarnation, c.layers, 0)
            for stage, c in enumerate(chosen)
        )
        self._interrupt(pipeline, why)

    # -- moves ------------------------------------------------------------------------------------------------------

    def _begin(self, pipeline: Pipeline, chosen: Sequence[Choice], why: str) -> None:
        """Has the next epoch assigned beside this one."""
        epoch = self._next_epoch(pipeline)
        stages = tuple(
            v.StagePlan(stage, c.worker.info.worker_id, c.worker.info.incarnation, c.layers, self._nonce())
            for stage, c in enumerate(chosen)
        )
        move = Move(
            pipeline.pipeline_id, epoch, State.FORMING, Phase.ASSIGN, Phase.ASSIGN.value, stages,
            why=why,
            copies=pages_to_copy(pipeline.stages, stages, pipeline.epoch),
            shares=self._num_shares(),
            deadline=self._now + MOVE_S,
        )  # fmt: skip
        self.moves[pipeline.pipeline_id] = move
        self._act(actions.PersistEpoch(pipeline.pipeline_id, epoch))
        self._log(f"{pipeline.pipeline_id} is to go to epoch {epoch}: {why}")
        for plan, choice in zip(stages, chosen, strict=True):
            address = choice.worker.info.address
            self._act(actions.Assign(pipeline.pipeline_id, epoch, len(stages), plan, address, move.shares, beside=True))

    def _move_on(self, pipeline: Pipeline, move: Move) -> None:
        """Time has passed, or a gateway has said where it is."""
        waits_for = self._followers() - move.moved - move.stayed
        if self._now >= move.deadline:
            self._fail(move, move.fault or f"not there in time: {', '.join(sorted(waits_for)) or move.phase.value}")
        elif move.published and not waits_for and self._now >= self._all_came_at:
            if move.fault:
                self._fail(move, move.fault)
            else:
                self._complete(pipeline, move)

    def _followers(self) -> set[str]:
        """Gateways that may drive pipelines."""
        return {name for name, (streams, at) in self._gateways.items() if streams or self._now < at + GONE_S}

    def _gateway_came(self, gateway_id: str, protocol: int) -> None:
        (self._old_gateways.discard if protocol >= MOVES else self._old_gateways.add)(gateway_id)
        streams, at = self._gateways.get(gateway_id, (0, 0.0))
        self._gateways[gateway_id] = streams + 1, at

    def _gateway_gone(self, gateway_id: str) -> None:
        streams, _ = self._gateways[gateway_id]
        self._gateways[gateway_id] = streams - 1, self._now
        here = self._followers()
        self._gateways = {name: seen for name, seen in self._gateways.items() if name in here}

    def _gateway_moved(self, event: events.GatewayMoved) -> None:
        move = self.moves.get(event.pipeline_id)
        if move is None or move.epoch != event.epoch or not move.published:
            pipeline = self.pipelines.get(event.pipeline_id)
            if pipeline is not None and event.epoch > pipeline.epoch and not event.error:
                self._later_epoch(pipeline, event.epoch, f"gateway {event.gateway_id}")
        elif event.error:
            move.stayed.add(event.gateway_id)
            self._interrupt(move, f"gateway {event.gateway_id}: {event.error}")
        else:
            move.moved.add(event.gateway_id)

    def _later_epoch(self, pipeline: Pipeline, epoch: int, who: str) -> None:
        """Somebody was at an epoch that is not known here, or not any more: a later one is formed."""
        if epoch > self._highest[pipeline.pipeline_id]:
            pipeline.restored = None
            pipeline.epoch = self._highest[pipeline.pipeline_id] = epoch
            self._act(actions.PersistEpoch(pipeline.pipeline_id, epoch))
        self._interrupt(pipeline, f"{who} knows the later epoch {epoch}")

    def _complete(self, pipeline: Pipeline, move: Move) -> None:
        """The move's epoch is the pipeline's."""
        old, before = pipeline.epoch, pipeline.stages
        self.given_up = ""
        del self.moves[pipeline.pipeline_id]
        self._failed.pop(pipeline.pipeline_id, None)
        pipeline.epoch, pipeline.stages, pipeline.last_stages = move.epoch, move.stages, move.stages
        pipeline.loaded, pipeline.routes, pipeline.acked = move.loaded, move.routes, move.acked
        pipeline.shares = move.shares
        pipeline.state, pipeline.reason, pipeline.serving_since = State.SERVING, "", self._now
        for plan in move.stages:
            worker = self.workers[plan.worker_id]
            worker.kept, worker.beside = plan.layers, None
        self._version += 1
        advised = self._advised.pop(pipeline.pipeline_id, None)
        if advised is not None and advised.ranges == tuple(plan.layers for plan in move.stages):
            self.step_times[pipeline.pipeline_id].moved(move.epoch, advised, self._now)
        self._persist(pipeline)
        self._log(f"{pipeline.pipeline_id} has gone to epoch {pipeline.epoch}: {move.why}")
        for plan in before:
            if self.knows(plan.worker_id, plan.incarnation):
                info = self.workers[plan.worker_id].info
                self._release(pipeline, old, info, f"{pipeline.pipeline_id} is at epoch {pipeline.epoch} now")
        self._publish()

    def _end_move(self, pipeline_id: str) -> Move | None:
        """Forgets a move, and has its workers forget it."""
        move = self.moves.pop(pipeline_id, None)
        if move is None:
            return None
        self._act(actions.Forget(pipeline_id, move.epoch + 1))
        for plan in move.stages:
            if self.knows(plan.worker_id, plan.incarnation):
                info = self.workers[plan.worker_id].info
                reason = "the pipeline is not moved"
                self._act(actions.Release(pipeline_id, move.epoch, info.worker_id, info.address, reason, alone=True))
        return move

    def _stored(self, pipeline: Pipeline) -> v.StoredPlan:
        plan, move = super()._stored(pipeline), self.moves.get(pipeline.pipeline_id)
        if move is None or move is pipeline or not move.published:
            return plan
        return replace(plan, next=super()._stored(move))

    def _take_up_move(self, pipeline: Pipeline, plan: v.StoredPlan) -> None:
        """Goes on with a move of which a coordinator before this one has told gateways."""
        copies = pages_to_copy(pipeline.stages, plan.stages, pipeline.epoch)
        move = Move(
            pipeline.pipeline_id,
            why="that had begun",
            copies=copies,
            copied={copy.index for copy in copies},
            published=True,
            taken_up=True,
            deadline=self._now + MOVE_S,
        )
        self._take_up(move, plan)
        self.moves[pipeline.pipeline_id] = move

    def _take_up(self, pipeline: Pipeline, plan: v.StoredPlan) -> None:
        """A pipeline, or a move, is as it was written down: its workers say so."""
        pipeline.restored, pipeline.epoch, pipeline.shares = None, plan.epoch, plan.shares
        pipeline.stages = pipeline.last_stages = plan.stages
        for stage in plan.stages:
            self.workers[stage.worker_id].kept = stage.layers
        pipeline.loaded, pipeline.routes = dict(enumerate(plan.loaded)), dict(enumerate(plan.routes))
        pipeline.acked = {stage.stage for stage in plan.stages}
        pipeline.state, pipeline.phase, pipeline.reason = State.SERVING, Phase.IDLE, ""

    # -- what forming does otherwise for a move ---------------------------------------------------------------------

    def _busy(self, pipeline: Pipeline) -> set[str]:
        moves = [move for name, move in self.moves.items() if name != pipeline.pipeline_id]
        return super()._busy(pipeline) | {plan.worker_id for move in moves for plan in move.stages}

    def _at(self, pipeline_id: str, epoch: int) -> Pipeline | None:
        move = self.moves.get(pipeline_id)
        return move if move is not None and move.epoch == epoch else super()._at(pipeline_id, epoch)

    def _next_epoch(self, pipeline: Pipeline) -> int:
        epoch = max(super()._next_epoch(pipeline), self._highest.get(pipeline.pipeline_id, 0) + 1)
        self._highest[pipeline.pipeline_id] = epoch
        return epoch

    def _links(self, pipeline: Pipeline) -> list[actions.MakeLink]:
        links = super()._links(pipeline)
        if isinstance(pipeline, Move):
            links += [self._copy_link(pipeline, copy) for copy in pipeline.copies]
        return links

    def _copy_link(self, move: Move, copy: v.Copy) -> actions.MakeLink:
        pipeline = self.pipelines[move.pipeline_id]
        sender, receiver = self._worker_at(pipeline, copy.from_stage).info, self._worker_at(move, copy.to_stage).info
        theirs, ours = pipeline.loaded[copy.from_stage].kv_layout, move.loaded[copy.to_stage].kv_layout
        if theirs != ours or sender.tp_size != receiver.tp_size:
            raise CannotForm(
                f"worker {receiver.worker_id} ({ours}, {receiver.tp_size} ranks) cannot take KV pages of "
                f"{sender.worker_id} ({theirs}, {sender.tp_size} ranks)"
            )
        name = self._transport(sender, receiver, quiet=False)
        return actions.MakeLink(
            move.pipeline_id, move.epoch, copy.from_stage, name, sender.address, receiver.address, receiver.worker_id,
            sender.addresses(name) or (),
            tuple(self._nonce() for _ in range(receiver.tp_size)),
            copy.to_stage,
            tokens=False,
            copy=copy,
        )  # fmt: skip

    def _link_up(self, pipeline: Pipeline, event: events.LinkUp) -> None:
        if not isinstance(pipeline, Move):
            super()._link_up(pipeline, event)
            return
        if event.copy is not None:
            pipeline.copied.add(event.copy)
        else:
            pipeline.routes[event.stage] = event.route
        if len(pipeline.routes) + len(pipeline.copied) == num_links(pipeline) + len(pipeline.copies):
            self._activate(pipeline)

    def _step_failed(self, pipeline: Pipeline, event: events.StepFailed) -> None:
        if isinstance(pipeline, Move):
            self._interrupt(pipeline, f"stage {event.stage}: {event.what}: {event.reason}")
        else:
            super()._step_failed(pipeline, event)

    def _serve(self, pipeline: Pipeline) -> None:
        if not isinstance(pipeline, Move):
            super()._serve(pipeline)
            return
        pipeline.state, pipeline.phase, pipeline.published = State.SERVING, Phase.IDLE, True
        pipeline.deadline = self._now + MOVE_S
        self._persist(self.pipelines[pipeline.pipeline_id])
        self._publish()

    def _interrupt(self, pipeline: Pipeline, reason: str, delay_s: float = 0.0) -> None:
        if not isinstance(pipeline, Move):
            self._end_move(pipeline.pipeline_id)
            super()._interrupt(pipeline, reason, delay_s)
        elif not pipeline.published:
            self._fail(pipeline, reason)
        elif not pipeline.fault:
            # Gateways may have gone over, and will say so soon.
            pipeline.fault, pipeline.deadline = reason, self._now + VERDICT_S

    def _fail(self, move: Move, reason: str) -> None:
        """The move is not to be. Gateways that went over nevertheless lose the pipeline, and with them the others."""
        name = move.pipeline_id
        self._end_move(name)
        self._failed[name], self._why_failed = self._failed.get(name, 0) + move.counts, reason
        self._move_after[name] = self._now + RETRY_MAX_S
        self._log(f"{name} has not gone to epoch {move.epoch}: {reason}", warning=True)
        if move.taken_up or (move.published and not self._followers() <= move.stayed):
            super()._interrupt(self.pipelines[name], reason)
        elif move.published:
            self._persist(self.pipelines[name])
        self._publish()

    def _down(self, pipeline: Pipeline, reason: str, *, final: bool) -> None:
        if isinstance(pipeline, Move):
            self._interrupt(pipeline, reason)
            return
        self._end_move(pipeline.pipeline_id)
        super()._down(pipeline, reason, final=final)
