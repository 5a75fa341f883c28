"""Drives one pipeline over all its epochs: a state machine (states.py draws it).

Requests are in the ledger, which outlives epochs. While no epoch is driven they wait there, as long as the outage lasts
(outage.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from stagemesh.errors import InternalError, StageLost, StagemeshError, TransportError
from stagemesh.protos.v1 import types_pb2
from stagemesh.settings.gateway import GatewaySettings

from ..session.reporter import Reporter
from ..session.slot_lease import SlotLease
from .ledger import Ledger, make_ledger
from .live import LiveRequest
from .loop import BatchLoop, Observers
from .outage import Outage
from .states import TRANSITIONS, Epochs, Event, State, Wish
from .switch import Switch, next_view
from .waiting import until_set

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What all drivers of a gateway share."""

    settings: GatewaySettings
    slot: SlotLease
    reporter: Reporter
    observers: Observers
    events: deque[dict[str, Any]]
    load_model: Callable[[types_pb2.PipelineView], Awaitable[None]]
    on_change: Callable[[], None]
    """Called when requests may have to move to another pipeline."""
    make_loop: Callable[..., BatchLoop] = BatchLoop


class PipelineDriver:
    """Drives one pipeline. `run` must run as a task."""

    def __init__(self, pipeline_id: str, around: Surroundings) -> None:
        self.pipeline_id = pipeline_id
        self.state = State.WAITING
        self.wish = Wish()
        self.reason = "no pipeline is formed yet"
        """Text on why it is not ready."""
        self.ledger: Ledger | None = None
        """Accepted requests. None before the first loop."""
        self.loop: BatchLoop | None = None
        self.task: asyncio.Task[None]
        """The task of `run`."""
        self.epochs = Epochs()
        self._around = around
        self._timing, self._clock = around.observers.timing, around.observers.clock
        self.outage = Outage(
            around.observers.metrics, around.settings.recovery_deadline, self._give_up, around.events, self._clock
        )
        self._changed = asyncio.Event()
        self._progress = asyncio.Event()
        """Set by its loops when something came back, or a loop is lost."""
        self._stopping = False
        self._closing: set[asyncio.Task[None]] = set()
        """Tasks that close earlier loops."""

    # -- requests ---------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a token has crossed every stage of the pipeline, and the pipeline takes requests."""
        loop = self.loop
        return not self.wish.draining and loop is not None and loop.lost is None and loop.crossed

    @property
    def recovering(self) -> bool:
        """Whether the pipeline is recovering from a loss, so that requests may wait for it."""
        return self.ledger is not None and self.outage.open and not (self.wish.down or self.wish.draining)

    @property
    def load(self) -> tuple[int, int]:
        """Number of running sequences, and number of waiting ones."""
        if self.ledger is None:
            return 0, 0
        return len(self.ledger.scheduler.running), len(self.ledger.scheduler.waiting)

    @property
    def requests(self) -> list[LiveRequest]:
        """Accepted requests that have not ended."""
        return self.ledger.requests if self.ledger is not None else []

    def accept(self, live: LiveRequest) -> None:
        """Queues a request."""
        assert self.ledger is not None
        self.ledger.add(live)
        self._wake()

    def forget(self, live: LiveRequest) -> None:
        """Removes a request that has ended."""
        if self.ledger is not None:
            self.ledger.remove(live)
            self._wake()

    def _wake(self) -> None:
        if self.loop is not None:
            self.loop.wake()

    @property
    def gives_up(self) -> bool:
        """Whether its requests should move to another pipeline.

        They should if this one is down or removed, if its outage lasts, or if it drains and has had time to finish.
        """
        finished = self.wish.draining and self._clock() > self.wish.drains_since + self._timing.finish_s
        return bool(self.requests) and (self.wish.down or finished or self.outage.lasted_s > self._timing.patience_s)

    def hand_out(self, to: str) -> list[LiveRequest]:
        """Gives up all requests, which go on at the pipeline named `to`. Returns them."""
        assert self.ledger is not None
        if self.loop is not None and self.loop.lost is None:
            self.loop.retire()
        self.ledger.end()
        found = self.requests
        for live in found:
            self.ledger.withdraw(live)
        self.outage.handed_over(self.pipeline_id, to, len(found))
        self._changed.set()
        return found

    @property
    def left(self) -> bool:
        """Whether the pipeline is leaving, and this gateway holds nothing of it any more."""
        return self.wish.leaving and self.state is State.WAITING and not self.requests

    def _give_up(self, cause: str) -> None:
        """Fails all requests, because the outage has lasted too long."""
        for live in self.requests:
            live.fail(StageLost(cause, retry_after_s=self._timing.retry_after_s))

    # -- the coordinator's side -------------------------------------------------------------------------------------

    def follow(self, view: types_pb2.PipelineView | None) -> None:
        """Takes the coordinator's newest view of the pipeline. None: it was removed."""
        drained = self.wish.draining
        self.wish.view = view
        if self.wish.draining and not drained:
            self.wish.drains_since = self._clock()
        driven = self.wish.driven
        if view is None:
            self.reason = f"{self.pipeline_id} was removed"
        elif driven is None or self.wish.draining:
            self.reason = view.reason or self.reason
        if self.loop is not None and (driven is None or not _is_at(self.loop, driven)):
            why = self.reason if driven is None else f"{self.pipeline_id} is at epoch {driven.epoch} now"
            self.loop.fail(StageLost(why))
        self._changed.set()

    async def run(self) -> None:
        """Goes from state to state until cancelled. Only a bug ends it, with an exception."""
        activities = {
            State.WAITING: self._wait,
            State.OPENING: self._open,
            State.CROSSING: self._cross,
            State.SERVING: self._serve,
            State.SWITCHING: self._switch,
        }
        while True:
            event = await activities[self.state]()
            self.state = TRANSITIONS[self.state, event]
            if self.state is State.WAITING:
                await self._end_loop()
            self._around.on_change()

    def stop(self) -> None:
        """Notes that the gateway stops, so that losses from now on count as no outage."""
        self._stopping = True

    async def close(self) -> None:
        """Fails all requests and closes all loops. Call it after `stop`, when `run` has ended."""
        self.outage.close()
        for live in self.requests:
            live.fail(StageLost("the gateway is stopping"))
        if self.loop is not None:
            await self.loop.close()
            self.loop = None
        await asyncio.gather(*self._closing)

    # -- the states -------------------------------------------------------------------------------------------------

    async def _wait(self) -> Event:
        """Waits until there is an epoch to drive, and a slot to drive it with."""
        told: object = ()  # The view after which the coordinator was told that this pipeline is left.
        while True:
            if self.left and told is not self.wish.view:
                told = self.wish.view
                self._around.reporter.left(self.pipeline_id)
            view = self.wish.driven
            if view is not None:
                if not self._is_unwanted() and self._around.slot.slot and self._is_due(view):
                    return Event.WANTED
                if view.HasField("next"):
                    # This gateway drives no epoch of it, so it has nothing to switch.
                    self._around.reporter.moved(self.pipeline_id, view.next.epoch)
            await self._until_changed()

    async def _open(self) -> Event:
        """Opens sessions on every stage."""
        view, slot = self.wish.driven, self._around.slot
        if view is None:
            return Event.REFUSED
        ledger = self.ledger or make_ledger(view, self._around.settings)
        loop = self._make_loop(view, ledger)
        try:
            await self._around.load_model(view)
            await loop.start(slot)
            self.loop, self.ledger = loop, ledger
            self.epochs.driven, self.epochs.refused = view.epoch, None
            wanted = self.wish.driven
            if wanted is None or not _is_at(loop, wanted):
                raise StageLost("the pipeline changed while its sessions were opened")
        except StagemeshError as e:
            self._refused(loop, e)
            self.loop = loop
            return Event.REFUSED
        return Event.OPENED

    async def _cross(self) -> Event:
        """Waits until a token has crossed every stage: a request's token, or a probe's if there are no requests."""
        loop = self.loop
        assert loop is not None
        while loop.lost is None and not loop.crossed:
            if self._is_unwanted():
                return Event.UNWANTED
            if not self.requests:
                loop.probe()
            await self._until_changed()
        return Event.LOST if loop.lost is not None else Event.CROSSED

    async def _serve(self) -> Event:
        """Waits until the pipeline is lost, has a next epoch, or is no longer wanted."""
        loop = self.loop
        assert loop is not None
        while loop.lost is None:
            if self._is_unwanted():
                return Event.UNWANTED
            view = self.wish.driven
            if view is not None and view.HasField("next"):
                epoch = view.next.epoch
                if epoch <= self.epochs.driven:
                    self._around.reporter.moved(self.pipeline_id, epoch)  # The first report may have been lost.
                elif epoch != self.epochs.stayed and self._around.slot.slot:
                    return Event.NEXT
            await self._until_changed()
        return Event.LOST

    async def _switch(self) -> Event:
        """Switches to the pipeline's next epoch, and reports it."""
        loop, ledger, view = self.loop, self.ledger, self.wish.driven
        assert loop is not None
        assert ledger is not None
        if view is None or not view.HasField("next"):
            return Event.STAYED if loop.lost is None else Event.LOST
        new = self._make_loop(next_view(view), ledger)
        switch = Switch(loop, new, ledger, view.next.copies, self._progress, self._timing)
        try:
            await switch.run(self._around.slot)
        except asyncio.CancelledError:
            await new.close()
            raise
        except Exception as e:
            error = e if isinstance(e, StagemeshError) else InternalError(f"{type(e).__name__}: {e}")
            log.warning("%s is not driven at epoch %d: %s", *new.key, error.message, exc_info=error is not e)
            self.epochs.stayed = new.view.epoch
            self._around.reporter.moved(*new.key, error=error.message)
            await new.close()
            return Event.STAYED if loop.lost is None else Event.LOST
        self.loop, self.epochs.driven = new, new.view.epoch
        # A token has crossed the next epoch, which ends any outage.
        self.outage.recovered(*new.key, len(self.requests), 0)
        await switch.finish()
        self.outage.moved(*new.key, switch.paused_s, len(self.requests), switch.pages)
        self._around.reporter.moved(*new.key)
        await loop.close()
        return Event.SWITCHED

    async def _end_loop(self) -> None:
        """Ends the loop. Its sessions close in the background, as that takes long if a worker hangs."""
        ended, self.loop = self.loop, None
        if ended is not None:
            await ended.stop()
            task = asyncio.create_task(ended.close(last_words=True))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._around.slot.renew()

    # -- parts of the states ------------------------------------------------------------------------------------------

    async def _until_changed(self) -> None:
        """Waits until something changes, at most for `retry_s`, as some conditions depend on time."""
        await until_set(self._changed, self._timing.retry_s)
        self._around.on_change()

    def _is_unwanted(self) -> bool:
        return self.wish.draining and not self.requests

    def _is_due(self, view: types_pb2.PipelineView) -> bool:
        """Whether the epoch may be tried now."""
        now, epochs = self._clock(), self.epochs
        if view.epoch == epochs.refused and now < epochs.retry_at:
            return False
        if view.epoch < epochs.driven:
            # No earlier epoch may emit tokens after a later one. A coordinator that does not know of the later epoch
            # learns of it here, and forms one after it. Or it will soon hear that the later epoch is lost.
            epochs.refuse(view.epoch, now, self._timing.again_s)
            self._around.reporter.moved(self.pipeline_id, epochs.driven)
            return False
        return True

    def _make_loop(self, view: types_pb2.PipelineView, ledger: Ledger) -> BatchLoop:
        around = self._around
        return around.make_loop(view, ledger, around.observers, self._progress, self._on_crossed, self._on_lost)

    def _refused(self, loop: BatchLoop, error: StagemeshError) -> None:
        """Sessions could not be opened.

        A link or the way to a worker may be broken without the coordinator's knowledge. If that lasts, it is reported.
        """
        again_s = max(self._timing.again_s, error.retry_after_s or 0.0)
        lasts_s = self.epochs.refuse(loop.view.epoch, self._clock(), again_s)
        self.reason = f"{self.pipeline_id} epoch {loop.view.epoch} cannot be driven yet: {error.message}"
        log.warning("%s", self.reason)
        unreachable = loop.session.unreachable
        if (unreachable or isinstance(error, TransportError)) and lasts_s > self._timing.in_vain_s:
            self.epochs.refused_since = self._clock()
            who = f"{', '.join(unreachable)} cannot be reached: " if unreachable else ""
            self._around.reporter.stuck(*loop.key, f"no session can be opened: {who}{error.message}", unreachable)

    def _on_crossed(self, loop: BatchLoop) -> None:
        log.info("a token has crossed all %d stages of %s epoch %d", len(loop.view.stages), *loop.key)
        if loop is self.loop and self.ledger is not None:
            self.outage.recovered(*loop.key, len(self.requests), self.ledger.replayed_tokens)
        self._changed.set()

    def _on_lost(self, loop: BatchLoop, error: StagemeshError) -> None:
        if loop is self.loop:
            self.reason = error.message
            if isinstance(error, InternalError):
                self.ledger = None
            elif not self._stopping:
                self.outage.lost(*loop.key, error.message, len(self.requests))
            if loop.stuck:
                self._around.reporter.stuck(*loop.key, error.message)
        self._changed.set()


def _is_at(loop: BatchLoop, view: types_pb2.PipelineView) -> bool:
    """Whether the loop drives the published epoch, or the next one."""
    return loop.view.epoch in (view.epoch, view.next.epoch)
