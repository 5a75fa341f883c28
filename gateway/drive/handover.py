"""A pipeline goes from one epoch to the next while its requests run.

The next epoch's stages stand already. Their sessions are opened beside those that serve, a token crosses them, and the
pages of layers that change hands are copied while steps go on. When only those pages are left that are written all the
time, nothing more is planned, what is out comes back, its pages are copied as it does, and the next loop goes on: it
need not wait for them, as no worker runs a step before the pages that were announced before it are there.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from stagemesh.errors import StageLost, Unavailable
from stagemesh.faults import point
from stagemesh.protos.v1 import stage_pb2, types_pb2

from ..schedule.copying import PageCopier
from .ledger import Work
from .session import BatchLoop
from .slot_lease import Seat

OUT = 2
"""Messages of a copy that may be under way."""
FEW = 8
"""Pages that are not worth another round while steps go on."""
COPY_S = 50.0
"""How long all of it may take."""
PAUSE_S = 5.0
"""How long what is out may take to come back."""
LOOK_S = 0.2


def next_view(view: types_pb2.PipelineView) -> types_pb2.PipelineView:
    """The pipeline as it will be."""
    after = types_pb2.PipelineView()
    after.CopyFrom(view)
    after.ClearField("next")
    after.ClearField("stages")
    after.epoch = view.next.epoch
    after.limits.pipelines = view.next.pipelines
    after.stages.extend(view.next.stages)
    return after


class Handover:
    """From `old` to `new`. Until it has gone over, `old` goes on whatever happens."""

    def __init__(self, old: BatchLoop, new: BatchLoop, work: Work, copies: Sequence[types_pb2.KvCopy]) -> None:
        self.paused_s = 0.0
        """From the last step's plan to the first one of the next epoch."""
        self.pages = 0
        """Copied, counted once for each copy's link."""
        self._old, self._new, self._work, self._copies = old, new, work, copies
        self._numbers = {copy.index: 0 for copy in copies}
        self._progress = asyncio.Event()
        self._slot = 0

    async def run(self, seat: Seat) -> None:
        """Goes over. Raises what ended either side, or Unavailable for pages that do not fit or do not come."""
        old, new, self._slot = self._old, self._new, seat.slot
        old.on_progress = new.on_progress = self._progress.set
        page: list[int] = []
        try:
            async with asyncio.timeout(COPY_S):
                # What is being refilled is not there to be copied.
                await self._until(lambda: not self._work.recovering)
                scheduler = self._work.scheduler
                scheduler.fit(new.share)
                await self._until(lambda: scheduler.fits)
                pages = scheduler.pages.choose(new.share)
                self._work.keep_to(pages)
                await new.open(seat, pages)
                if not self._work.fits(new.shape):
                    raise Unavailable("the next workers have pages of another size")
                page = self._work.scheduler.pages.allocate(1) or []
                if page:
                    probe = new.begin_probe(page[0])
                    await self._until(lambda: probe.done)
                copier = PageCopier(self._work.scheduler)
                old.on_planned = copier.note
                await self._copy(copier)
            old.pause()
            paused_at = time.monotonic()
            async with asyncio.timeout(PAUSE_S):
                while True:
                    # Pages of rows that are back are under way while the others' steps run.
                    self._send(copier.next())
                    self._check_lost()
                    if not self._work.scheduler.out:
                        break
                    await self._wait()
        except BaseException as e:
            # The probe may still be under way.
            self._work.quarantined += page
            self._work.stay()
            if isinstance(e, TimeoutError):
                what = f"pages were not copied within {COPY_S:g} s, or steps not back within {PAUSE_S:g} s"
                raise Unavailable(what) from e
            raise
        else:
            self._work.scheduler.pages.free(page)
            point("gateway.before_switch")
            old.retire()
            new.take_over({copy.to_stage for copy in self._copies})
            point("gateway.after_switch")
            self.paused_s = time.monotonic() - paused_at
        finally:
            old.on_planned = lambda plan: None
            old.resume()

    async def finish(self) -> None:
        """Behind `run`: until all pages have come, so that the workers of the epoch before need not keep theirs. Where
        the next epoch is lost meanwhile, they are computed again."""
        while self._under_way() and self._new.lost is None:
            await self._wait()
        if not self._under_way():
            self._work.arrived()

    async def _copy(self, copier: PageCopier) -> None:
        """Rounds of pages, until few are left that no step writes."""
        at_once = max([2 * FEW, *(self._new.copy_pages(copy.to_stage) for copy in self._copies)])
        while self._copies:
            pages = copier.next(at_once)
            self._send(pages)
            if len(pages) < FEW:
                break
            await self._until(lambda: self._under_way() < OUT * len(self._copies))
        await self._until(lambda: not self._under_way())

    def _under_way(self) -> int:
        return sum(self._numbers.values()) - len(self._new.copied)

    def _send(self, pages: Sequence[int]) -> None:
        """Tells both ends of every copy."""
        for copy in self._copies:
            most = self._new.copy_pages(copy.to_stage)
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
                self._new.tell(copy.to_stage, message)
                self._old.tell(copy.from_stage, message)
        self.pages += len(pages) * len(self._copies)

    async def _until(self, reached: Callable[[], bool]) -> None:
        # What is lost has nothing out, either.
        self._check_lost()
        while not reached():
            await self._wait()
            self._check_lost()

    def _check_lost(self) -> None:
        for loop in (self._old, self._new):
            if loop.lost is not None:
                raise StageLost(f"{loop.view.pipeline_id} epoch {loop.view.epoch}: {loop.lost.message}")

    async def _wait(self) -> None:
        """For something to come back, or a while."""
        self._progress.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await self._progress.wait()
