"""Switches a pipeline from one epoch to the next while its requests run.

The next epoch's stages are active already. Their sessions are opened while the old ones serve, and a token crosses
them. Pages of layers that go to other workers are copied while steps go on. When only pages remain that steps write all
the time, planning stops. Steps in flight come back, and their pages are copied as they do. Then the next loop goes on.
It need not wait for the pages: no worker runs a step before the pages that were announced before it have arrived.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from stagemesh.errors import StageLost, Unavailable
from stagemesh.faults import point
from stagemesh.protos.v1 import stage_pb2, types_pb2

from ..schedule.copying import PageCopier
from ..session.slot_lease import SlotLease
from ..timing import GatewayTiming
from .ledger import Ledger
from .loop import BatchLoop
from .waiting import until_set

OUT = 2
"""Most messages of a copy that may be in flight."""
FEW = 8
"""So few pages are not worth another round while steps go on."""


def next_view(view: types_pb2.PipelineView) -> types_pb2.PipelineView:
    """The view of the pipeline at its next epoch."""
    after = types_pb2.PipelineView()
    after.CopyFrom(view)
    after.ClearField("next")
    after.ClearField("stages")
    after.epoch = view.next.epoch
    after.limits.pipelines = view.next.pipelines
    after.stages.extend(view.next.stages)
    return after


class Switch:
    """A switch from `old` to `new`. If it fails, `old` goes on."""

    def __init__(
        self,
        old: BatchLoop,
        new: BatchLoop,
        ledger: Ledger,
        copies: Sequence[types_pb2.KvCopy],
        progress: asyncio.Event,
        timing: GatewayTiming,
    ) -> None:
        """`progress`: set by both loops when something came back."""
        self.paused_s = 0.0
        """Seconds in which no step was planned."""
        self.pages = 0
        """Number of copied pages. A page counts once for each copy."""
        self._old, self._new, self._ledger, self._copies = old, new, ledger, copies
        self._progress, self._timing = progress, timing
        self._numbers = {copy.index: 0 for copy in copies}
        self._slot = 0

    async def run(self, slot: SlotLease) -> None:
        """Switches. Raises StageLost if either side is lost, Unavailable if pages do not fit or do not arrive."""
        timing, ledger = self._timing, self._ledger
        self._slot = slot.slot
        try:
            async with asyncio.timeout(timing.copy_s):
                await self._make_ready(slot)
                copier = ledger.copier = PageCopier(ledger.scheduler)
                await self._copy(copier)
            self._old.pause()
            paused_at = time.monotonic()
            async with asyncio.timeout(timing.pause_s):
                await self._drain(copier)
        except BaseException as e:
            ledger.stay()
            if isinstance(e, TimeoutError):
                raise Unavailable(
                    f"pages were not copied within {timing.copy_s:g} s, or steps not back within {timing.pause_s:g} s"
                ) from e
            raise
        else:
            point("gateway.before_switch")
            self._old.retire()
            self._new.take_over({copy.to_stage for copy in self._copies})
            point("gateway.after_switch")
            self.paused_s = time.monotonic() - paused_at
        finally:
            ledger.copier = None
            self._old.resume()

    async def finish(self) -> None:
        """Waits after `run` until all pages have arrived, so that the old epoch's workers may free theirs.

        If the next epoch is lost meanwhile, missing pages are computed again.
        """
        while self._under_way() and self._new.lost is None:
            await until_set(self._progress, self._timing.look_s)
        if not self._under_way():
            self._ledger.arrived()

    async def _make_ready(self, slot: SlotLease) -> None:
        """Opens the next epoch's sessions, whose pages include all held ones, and sends a probe across it."""
        ledger, scheduler, new = self._ledger, self._ledger.scheduler, self._new
        # Pages that are being refilled cannot be copied yet.
        await self._until(lambda: not ledger.recovering)
        scheduler.fit(new.session.share)
        await self._until(lambda: scheduler.fits)
        await new.open(slot, ledger.pages_for(new.session.share))
        if not ledger.fits(new.session.shape):
            raise Unavailable("the next workers have pages of another size")
        if new.probe():
            await self._until(lambda: new.crossed)

    async def _copy(self, copier: PageCopier) -> None:
        """Copies pages in rounds, until only few remain that no step writes."""
        at_once = max([2 * FEW, *(self._new.session.copy_pages(copy.to_stage) for copy in self._copies)])
        while self._copies:
            pages = copier.next(at_once)
            self._send(pages)
            if len(pages) < FEW:
                break
            await self._until(lambda: self._under_way() < OUT * len(self._copies))
        await self._until(lambda: not self._under_way())

    async def _drain(self, copier: PageCopier) -> None:
        """Waits until no step is in flight. Pages of steps that are back are copied while the others run."""
        while True:
            self._send(copier.next())
            self._check_lost()
            if not self._ledger.scheduler.out:
                return
            await until_set(self._progress, self._timing.look_s)

    def _under_way(self) -> int:
        return sum(self._numbers.values()) - len(self._new.copied)

    def _send(self, pages: Sequence[int]) -> None:
        """Tells both ends of every copy to copy these pages."""
        for copy in self._copies:
            most = self._new.session.copy_pages(copy.to_stage)
            if not most:
                raise Unavailable(f"stage {copy.to_stage} of the next epoch takes no pages: its link is gone")
            for at in range(0, len(pages), most):
                self._numbers[copy.index] += 1
                message = stage_pb2.RunRequest(
                    copy=stage_pb2.CopyPages(
                        epoch=self._new.view.epoch,
                        index=copy.index,
                        number=self._numbers[copy.index],
                        pages=pages[at : at + most],
                        slot=self._slot,
                    )
                )
                self._new.session.tell(copy.to_stage, message)
                self._old.session.tell(copy.from_stage, message)
        self.pages += len(pages) * len(self._copies)

    async def _until(self, reached: Callable[[], bool]) -> None:
        # A lost loop has no steps in flight either, so check for that first.
        self._check_lost()
        while not reached():
            await until_set(self._progress, self._timing.look_s)
            self._check_lost()

    def _check_lost(self) -> None:
        for loop in (self._old, self._new):
            if loop.lost is not None:
                raise StageLost(f"{loop.view.pipeline_id} epoch {loop.view.epoch}: {loop.lost.message}")
