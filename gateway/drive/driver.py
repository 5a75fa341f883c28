"""One pipeline as a gateway drives it: a batch loop on the epoch that serves, over the work that outlives epochs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stagemesh.errors import InternalError, StageLost, StagemeshError, TransportError
from stagemesh.protos.v1 import types_pb2
from stagemesh.settings.gateway import GatewaySettings

from ..api.request import GenerationRequest, Sampling
from ..telemetry.bubbles import Bubbles
from ..telemetry.metrics import Load, Metrics
from ..telemetry.trace import Recorder
from .handover import Handover, next_view
from .ledger import Work, make_work
from .live import LiveRequest
from .outage import Outage
from .reporter import Reporter
from .session import BatchLoop
from .slot_lease import Seat

log = logging.getLogger(__name__)

RETRY_S = 0.2
AGAIN_S = 0.5
"""Between two tries to open sessions of one epoch."""
IN_VAIN_S = 3.0
"""How long sessions of an epoch that serves may fail to open."""
WARM_UP_TIMEOUT_S = 120.0
RETRY_AFTER_S = 2.0
FINISH_S = 30.0
"""How long a pipeline that drains may finish what it runs, before another one does."""
PATIENCE_S = 5.0
"""How long a lost pipeline is waited for where another one serves: to go on there, all has to be computed again."""

SERVING = (types_pb2.PIPELINE_STATE_SERVING, types_pb2.PIPELINE_STATE_DRAINING)
Key = tuple[str, int]
"""Pipeline and epoch."""


@dataclass(frozen=True)
class Surroundings:
    """What all pipelines of a gateway have in common."""

    settings: GatewaySettings
    seat: Seat
    reporter: Reporter
    metrics: Metrics
    bubbles: Bubbles
    recorder: Recorder
    events: deque[dict[str, Any]]
    load_model: Callable[[types_pb2.PipelineView], Awaitable[None]]
    make_live: Callable[[GenerationRequest], LiveRequest]
    """Once the model is loaded; it is told of its end."""
    on_change: Callable[[], None]
    """Something may have to go elsewhere."""


class Drive:
    """Follows one pipeline over its epochs. `run` must run."""

    def __init__(self, pipeline_id: str, around: Surroundings) -> None:
        self.pipeline_id = pipeline_id
        self.reason = "no pipeline is formed yet"
        """Why it is not ready."""
        self.down = False
        """There is nothing to make it of."""
        self.draining = False
        self.leaving = False
        """It is to be no more."""
        self.gone = False
        """It is no more."""
        self.told_left = False
        """The coordinator has been told that it is left, since it spoke of it last."""
        self.work: Work | None = None
        """What was accepted, from the first loop on."""
        self.loop: BatchLoop | None = None
        self.outage = Outage(around.metrics, around.settings.recovery_deadline, self._give_up, around.events)
        self._around = around
        self._wanted: types_pb2.PipelineView | None = None
        self._drains_since = 0.0
        self._warm_up: LiveRequest | None = None
        self._in_vain: tuple[float, Key] | None = None
        """Since when sessions of which epoch cannot be opened."""
        self._not_before: tuple[Key, float] = ("", 0), 0.0
        """An epoch that could not be opened, and when it is tried again."""
        self._opening = False
        self._moving: asyncio.Task[None] | None = None
        self._driven = 0
        """The highest epoch that was driven."""
        self._moved: Key | None = None
        """The next epoch that was gone over to."""
        self._not_moved: Key | None = None
        """One that could not be gone over to."""
        self._changed = asyncio.Event()
        self._stopping = False
        self._closing: set[asyncio.Task[None]] = set()
        """Ends of loops before."""

    # -- requests ---------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a token has crossed every stage of it, and it takes requests."""
        return not self.draining and self.loop is not None and self.loop.lost is None and self.loop.crossed

    @property
    def recovering(self) -> bool:
        """Whether it is being made good: requests may wait for that."""
        return self.work is not None and self.outage.open and not (self.down or self.draining)

    @property
    def busy(self) -> float:
        """Choices that run and wait, as a share of those it can run at once."""
        assert self.work is not None
        scheduler = self.work.scheduler
        return (len(scheduler.running) + len(scheduler.waiting)) / scheduler.max_num_seqs

    @property
    def load(self) -> Load:
        """Of its scheduler."""
        if self.work is None:
            return Load()
        scheduler = self.work.scheduler
        pages = scheduler.pages
        used = 1 - pages.num_free / pages.num_pages
        return Load(len(scheduler.running), len(scheduler.waiting), used, len(scheduler.out))

    def accept(self, live: LiveRequest) -> None:
        """A request joins the queue."""
        assert self.work is not None
        self.work.add(live)
        self.wake()

    def forget(self, live: LiveRequest) -> None:
        """A request has ended."""
        if self.work is not None:
            self.work.remove(live)
        self.wake()

    def wake(self) -> None:
        """There is something new in the work."""
        if self.loop is not None:
            self.loop.wake()

    @property
    def gives_up(self) -> bool:
        """Whether what it runs is to go on elsewhere: it is down or no more, not made good soon, or had its time to
        finish."""
        late = self.draining and time.monotonic() > self._drains_since + FINISH_S
        late |= self.outage.lasted_s > PATIENCE_S
        return bool(self.work and self.work.live) and (self.down or late)

    def hand_out(self, to: str) -> list[LiveRequest]:
        """All requests leave, to go on at the pipeline named `to`."""
        assert self.work is not None
        if self._warm_up is not None:
            self._warm_up.fail(StageLost(f"{self.pipeline_id} is left"))
        if self.loop is not None and self.loop.lost is None:
            self.loop.retire()
        self.work.end()
        found = list(dict.fromkeys(self.work.live.values()))
        for live in found:
            self.work.withdraw(live)
        self.outage.handed_over(self.pipeline_id, to, len(found))
        self._changed.set()
        return found

    @property
    def left(self) -> bool:
        """Whether it is to be left, and nothing of it is held any more."""
        under_way = self._opening or (self._moving is not None and not self._moving.done())
        return self.leaving and self.loop is None and not under_way and not (self.work and self.work.live)

    # -- the coordinator's side -------------------------------------------------------------------------------------

    def follow(self, view: types_pb2.PipelineView | None) -> None:
        """The coordinator's word of it; None: it is no more."""
        draining, self.gone = False, view is None
        self.told_left = False
        if view is None:
            self._wanted, self.down, self.leaving = None, True, True
            self.reason = f"{self.pipeline_id} is no more"
        else:
            self.leaving = view.leaving
            self.down = view.state == types_pb2.PIPELINE_STATE_DOWN
            draining = view.state == types_pb2.PIPELINE_STATE_DRAINING
            self._wanted = view if view.state in SERVING else None
            if self._wanted is None or draining:
                self.reason = view.reason or self.reason
        if draining and not self.draining:
            self._drains_since = time.monotonic()
        self.draining = draining
        if self.loop is not None and (self._wanted is None or not _is_at(self.loop, self._wanted)):
            wanted = self._wanted
            self.loop.fail(
                StageLost(self.reason if wanted is None else f"{self.pipeline_id} is at epoch {wanted.epoch} now")
            )
        self._changed.set()

    async def run(self) -> None:
        """Keeps a batch loop on the epoch that is wanted; tries again while it cannot be opened."""
        while True:
            moving = self._moving is not None and not self._moving.done()
            if self._moving is not None and not moving:
                self._moving.result()
            live = self.work.live if self.work is not None else {}
            over = self.draining and not live and not moving
            if self.loop is not None and (self.loop.lost is not None or over):
                ended, self.loop = self.loop, None
                await self._end(ended)
                self._around.seat.renew()
            wanted = self._wanted
            behind = wanted is not None and (wanted.pipeline_id, wanted.next.epoch) == self._moved
            # Behind: what was gone over to has been lost, of which the coordinator is about to hear.
            wants = wanted is not None and not behind and bool(live or not self.draining)
            if self.loop is None and wanted is not None and wants and self._around.seat.slot and self._is_due(wanted):
                self._opening = True
                try:
                    await self._open(wanted)
                finally:
                    self._opening = False
            await self._cross_if_idle()
            if wanted is not None and wanted.HasField("next") and not moving:
                self._moving = asyncio.create_task(self._move(wanted))
            self._around.on_change()
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S):
                    await self._changed.wait()

    async def stop(self) -> None:
        """Ends a move that is under way, and what waits."""
        self._stopping = True
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.gather(self._moving, return_exceptions=True)

    async def close(self) -> None:
        """Behind `stop` and the end of `run`: everything ends."""
        self.outage.close()
        if self.work is not None:
            self.work.fail(StageLost("the gateway is stopping"))
        if self.loop is not None:
            await self.loop.close()
            self.loop = None
        await asyncio.gather(*self._closing)

    async def _end(self, loop: BatchLoop) -> None:
        """Stops a loop; its sessions end beside what comes next, for a worker that hangs takes its time."""
        await loop.stop()
        task = asyncio.create_task(loop.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _make_loop(self, view: types_pb2.PipelineView, work: Work) -> BatchLoop:
        around = self._around
        return BatchLoop(view, work, around.metrics, around.bubbles, around.recorder, self._on_crossed, self._on_lost)

    def _is_due(self, view: types_pb2.PipelineView) -> bool:
        """Not at once again where it just failed: each try takes a slot, and there are 250 a minute."""
        key, at = self._not_before
        return key != (view.pipeline_id, view.epoch) or time.monotonic() >= at

    async def _open(self, view: types_pb2.PipelineView) -> None:
        if view.epoch < self._driven:
            # No epoch emits behind a later one; a coordinator that does not know of that forms one behind it.
            self._not_before = (view.pipeline_id, view.epoch), time.monotonic() + AGAIN_S
            self._around.reporter.moved(view.pipeline_id, self._driven)
            return
        seat = self._around.seat
        work = self.work or make_work(view, self._around.settings)
        work.costs.only_for([(stage.layers.first, stage.layers.last) for stage in view.stages])
        loop = self._make_loop(view, work)
        try:
            await self._around.load_model(view)
            await loop.start(seat)
            self.loop, self.work, self._driven = loop, work, view.epoch
            if self._wanted is None or loop.key != (self._wanted.pipeline_id, self._wanted.epoch):
                raise StageLost("the pipeline changed while its sessions were opened")
            if not work.live:
                await self._cross(loop)
        except StagemeshError as e:
            self._not_before = loop.key, time.monotonic() + max(AGAIN_S, e.retry_after_s or 0.0)
            self._not_opened(loop.key, e, loop.unreachable)
            self.reason = f"{view.pipeline_id} epoch {view.epoch} cannot be driven yet: {e.message}"
            log.warning("%s", self.reason)
            self.loop = None
            await self._end(loop)
            seat.renew()

    def _not_opened(self, key: Key, error: StagemeshError, unreachable: Sequence[str]) -> None:
        """A link of it, or the way to a worker, may be gone without the coordinator knowing: it hears of it when that
        lasts."""
        since, _ = self._in_vain if self._in_vain is not None and self._in_vain[1] == key else (time.monotonic(), key)
        self._in_vain = since, key
        if (unreachable or isinstance(error, TransportError)) and time.monotonic() - since > IN_VAIN_S:
            self._in_vain = None
            reason = f"{', '.join(unreachable)} cannot be reached: " if unreachable else ""
            self._around.reporter.stuck(*key, f"no session can be opened: {reason}{error.message}", unreachable)

    async def _move(self, view: types_pb2.PipelineView) -> None:
        """Goes over to the pipeline's next epoch, and says so; says so again if it has."""
        key = view.pipeline_id, view.next.epoch
        loop, work, seat, reporter = self.loop, self.work, self._around.seat, self._around.reporter
        if loop is None or work is None or key == self._moved:
            reporter.moved(*key)
            return
        if loop.lost is not None or key == self._not_moved or not seat.slot:
            return
        after = next_view(view)
        new = self._make_loop(after, work)
        handover = Handover(loop, new, work, view.next.copies)
        try:
            await handover.run(seat)
        except Exception as e:
            if not isinstance(e, StagemeshError):
                log.exception("going over failed")
            self._not_moved = key
            why = e.message if isinstance(e, StagemeshError) else f"{type(e).__name__}: {e}"
            log.warning("%s is not driven at epoch %d: %s", *key, why)
            reporter.moved(*key, error=why)
            await new.close()
            return
        self.loop, self._moved, self._driven = new, key, after.epoch
        work.costs.only_for([(stage.layers.first, stage.layers.last) for stage in after.stages])
        # A token has crossed the next epoch: whatever was waited for is over.
        self.outage.recovered(*key, len(set(work.live.values())), 0)
        await handover.finish()
        self.outage.moved(*key, handover.paused_s, len(set(work.live.values())), handover.pages)
        reporter.moved(*key)
        await loop.close()

    async def _cross_if_idle(self) -> None:
        """Those whose tokens were to cross have ended before they could."""
        loop, work = self.loop, self.work
        if loop is None or loop.lost is not None or loop.crossed or work is None or work.live:
            return
        try:
            await self._cross(loop)
        except StagemeshError as e:
            log.warning("no token has crossed %s epoch %d: %s", *loop.key, e.message)

    async def _cross(self, loop: BatchLoop) -> None:
        """Sends a token across every stage; two, so that a decode step has run as well. Raises what ended them."""
        request = GenerationRequest(
            request_id=f"warm-up-{loop.view.pipeline_id}-{loop.view.epoch}-{secrets.token_hex(4)}",
            prompt=(0,),
            sampling=Sampling(temperature=0.0),
            max_tokens=2,
            deadline_s=WARM_UP_TIMEOUT_S,
        )
        self._warm_up = self._around.make_live(request)
        self.accept(self._warm_up)
        try:
            async for _ in self._warm_up:
                pass
        finally:
            self._warm_up = None

    def _on_crossed(self, loop: BatchLoop) -> None:
        log.info("a token has crossed all %d stages of %s epoch %d", len(loop.view.stages), *loop.key)
        if self.work is not None:
            self.outage.recovered(*loop.key, len(set(self.work.live.values())), self.work.replayed_tokens)

    def _on_lost(self, loop: BatchLoop, error: StagemeshError) -> None:
        if loop is self.loop:
            self.reason = error.message
            if self._warm_up is not None:
                self._warm_up.fail(error)
            if isinstance(error, InternalError):
                self.work = None
            elif not self._stopping:
                live = len(set(self.work.live.values())) if self.work is not None else 0
                self.outage.lost(*loop.key, error.message, live)
            if loop.stuck:
                self._around.reporter.stuck(*loop.key, error.message)
        self._changed.set()

    def _give_up(self, cause: str) -> None:
        if self.work is not None:
            self.work.fail(StageLost(cause, retry_after_s=RETRY_AFTER_S))


def _is_at(loop: BatchLoop, view: types_pb2.PipelineView) -> bool:
    """Whether the loop drives the pipeline as published, or as it is about to be."""
    following = view.next.epoch if view.HasField("next") else view.epoch
    return loop.key[0] == view.pipeline_id and loop.key[1] in (view.epoch, following)
