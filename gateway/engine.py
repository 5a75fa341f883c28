"""The gateway's engine: follows the coordinator, keeps a batch loop on the pipeline that serves, admits requests.

It is ready only when a real token has crossed every stage of the current epoch.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from stagemesh import checkpoint, rpc
from stagemesh.config import GatewaySettings
from stagemesh.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    StageLost,
    StagemeshError,
    TransportError,
    Unavailable,
)
from stagemesh.protocol import PROTOCOL
from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2

from .batch_loop import BatchLoop
from .bubbles import Bubbles
from .handover import Handover, next_view
from .live import LiveRequest
from .metrics import Load, Metrics
from .outage import Outage
from .reporter import Reporter
from .request import GenerationRequest, ModelCard, Sampling
from .tokenizer import Tokenizer
from .trace import Recorder
from .work import Work, make_work

log = logging.getLogger(__name__)

RETRY_S = 0.2
IN_VAIN_S = 3.0
"""How long sessions of an epoch that serves may fail to open."""
STEPS_S = 2.0
"""Between two reports of what steps take."""
WARM_UP_TIMEOUT_S = 120.0
RETRY_AFTER_S = 2.0


class MeshEngine:
    """Implements `request.Engine` on a real mesh."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.tokenizer: Tokenizer | None = None
        self.model: ModelCard | None = None
        self.mesh = types_pb2.MeshView()
        self.recorder = Recorder()
        self._bubbles = Bubbles()
        self._instance = secrets.randbits(63)
        self._slot = 0
        self._watching: asyncio.Task[None] | None = None
        self._loop: BatchLoop | None = None
        self._work: Work | None = None
        """What was accepted, from the first loop on."""
        self._warm_up: LiveRequest | None = None
        self._outage = Outage(metrics, settings.recovery_deadline, self._give_up)
        self._reporter = Reporter(settings.coordinator, settings.gateway_id)
        self._in_vain: tuple[float, tuple[str, int]] | None = None
        """Since when sessions of which epoch cannot be opened."""
        self._moving: asyncio.Task[None] | None = None
        self._moved: tuple[str, int] | None = None
        """The next epoch of a pipeline that was gone over to."""
        self._not_moved: tuple[str, int] | None = None
        """One that could not be gone over to."""
        self._down = False
        """There is nothing to make a pipeline of."""
        self._reason = "no coordinator has been reached yet"
        self._draining = self._stopping = False
        self._live: dict[str, LiveRequest] = {}
        self._changed = asyncio.Event()
        self._wanted: types_pb2.PipelineView | None = None
        self._following: asyncio.Task[None] | None = None
        metrics.register(self._bubbles)
        metrics.watch(self._load)

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> asyncio.Task[None]:
        """Starts following the coordinator. The task ends only by a bug, which is then its exception."""
        self._following = asyncio.create_task(self._follow())
        return self._following

    async def _follow(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch())
            group.create_task(self._keep_loop())
            group.create_task(self._reporter.run())
            group.create_task(self._report_steps())

    async def stop(self, drain_timeout_s: float) -> None:
        """Takes nothing new, lets live requests finish for a while, then ends."""
        self._stopping = True
        deadline = time.monotonic() + drain_timeout_s
        while self._live and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.gather(self._moving, return_exceptions=True)
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        self._outage.close()
        if self._work is not None:
            self._work.fail(StageLost("the gateway is stopping"))
        if self._loop is not None:
            await self._loop.close()

    # -- the front ends' side ---------------------------------------------------------------------------------------

    def ready(self) -> tuple[bool, str]:
        """Whether a token has crossed every stage of the pipeline that serves; else why not."""
        if self._stopping:
            return False, "the gateway is stopping"
        if self._draining:
            return False, f"a stage is being drained: {self._reason}"
        if self._loop is not None and self._loop.lost is None and self._loop.crossed:
            return True, ""
        return False, self._reason

    def submit(self, request: GenerationRequest) -> LiveRequest:
        """Accepts a request into the queue: from here on it ends exactly once. While a lost stage is being made good it
        waits there.

        Raises Unavailable, QueueFull, PromptTooLong or InvalidRequest.
        """
        ready, reason = self.ready()
        recovering = self._outage.open and not (self._down or self._stopping or self._draining)
        if not (ready or recovering) or self._work is None or self.model is None:
            raise Unavailable(f"no pipeline can serve now: {reason}", retry_after_s=RETRY_AFTER_S)
        if len(request.prompt) + request.max_tokens > self.model.max_model_len:
            raise PromptTooLong(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} output tokens exceed the longest "
                f"sequence of {self.model.max_model_len} tokens",
                param="max_tokens",
            )
        if request.request_id in self._live:
            raise InvalidRequest(f"a request named {request.request_id} is running", param="request_id")
        scheduler = self._work.scheduler
        most = self.settings.max_waiting + scheduler.max_num_seqs
        if request.n > most:
            raise InvalidRequest(f"n is {request.n}, and this gateway holds at most {most} choices at once", param="n")
        waiting = len(scheduler.waiting)
        if waiting + request.n > most - len(scheduler.running):
            raise QueueFull(
                f"{waiting} requests are waiting, and at most {self.settings.max_waiting} may",
                retry_after_s=RETRY_AFTER_S,
            )
        return self._submit(request, self._work)

    def _submit(self, request: GenerationRequest, work: Work) -> LiveRequest:
        assert self.tokenizer is not None
        seed = request.sampling.seed
        if seed is None:
            seed = secrets.randbits(32)
            log.debug("request %s draws with seed %d", request.request_id, seed)
        live = LiveRequest(request, seed % 2**64, self.tokenizer, self.metrics, self._on_end)
        if live.ended:
            return live  # All of it was promised before.
        bound_s = min(request.deadline_s or self.settings.request_timeout, self.settings.request_timeout)
        live.deadline = asyncio.get_running_loop().call_later(
            bound_s, live.fail, DeadlineExceeded(f"request {request.request_id} took longer than {bound_s:g} s")
        )
        self._live[request.request_id] = live
        work.add(live)
        if self._loop is not None:
            self._loop.wake()
        return live

    def _on_end(self, live: LiveRequest) -> None:
        self._live.pop(live.request.request_id, None)
        if self._work is not None:
            self._work.remove(live)
        if self._loop is not None:
            self._loop.wake()

    def cancel(self, request_id: str) -> bool:
        """Cancels by name; False when it is not running."""
        live = self._live.get(request_id)
        if live is None:
            return False
        live.cancel()
        return True

    def describe(self) -> dict[str, object]:
        """The mesh as this gateway sees it, JSON-ready."""
        ready, reason = self.ready()
        load = self._load()
        scheduler = self._work.scheduler if self._work is not None else None
        seen: dict[str, Any] = MessageToDict(
            self.mesh, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return {
            "ready": ready,
            "reason": reason,
            "gateway": {
                "id": self.settings.gateway_id,
                "coordinator": self.settings.coordinator,
                "running": load.running,
                "waiting": load.waiting,
                "steps_in_flight": load.steps_in_flight,
                "free_pages": scheduler.pages.num_free if scheduler else 0,
                "total_pages": scheduler.pages.num_pages if scheduler else 0,
            },
            "events": list(self._outage.events),
            **seen,
        }

    def _load(self) -> Load:
        if self._work is None:
            return Load()
        scheduler = self._work.scheduler
        pages = scheduler.pages
        used = 1 - pages.num_free / pages.num_pages
        return Load(len(scheduler.running), len(scheduler.waiting), used, len(scheduler.out))

    # -- the coordinator's side -------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Follows the coordinator; while it is away, what runs goes on."""
        channel = rpc.channel(self.settings.coordinator)
        stub = coordinator_pb2_grpc.CoordinatorStub(channel)
        told = False
        try:
            while True:
                self._watching = asyncio.create_task(self._watch_once(stub))
                try:
                    await asyncio.wait((self._watching,))
                finally:
                    self._watching.cancel()
                if self._watching.cancelled():
                    continue  # A fresh slot is wanted.
                e = self._watching.exception()
                if e is None:
                    told = False
                elif not isinstance(e, StagemeshError):
                    raise e
                else:
                    if not told:
                        log.warning("no coordinator at %s: %s", self.settings.coordinator, e.message)
                        told = True
                    if self._loop is None:
                        self._reason = f"the coordinator at {self.settings.coordinator} cannot be reached"
                await asyncio.sleep(RETRY_S)
        finally:
            await channel.close(None)

    async def _report_steps(self) -> None:
        """While requests run."""
        while True:
            await asyncio.sleep(STEPS_S)
            loop, work = self._loop, self._work
            if loop is None or work is None or loop.lost is not None or work.recovering or not work.live:
                continue
            seconds = work.costs.typical_s()
            if seconds is not None and len(seconds) == len(loop.view.stages):
                self._reporter.steps(*loop.key, seconds)

    async def _watch_once(self, stub: coordinator_pb2_grpc.CoordinatorStub) -> None:
        """One stream of the mesh, until the coordinator ends it. Raises its error, or Unavailable."""
        request = coordinator_pb2.WatchPipelinesRequest(
            gateway_id=self.settings.gateway_id, instance=self._instance, protocol=PROTOCOL
        )
        with rpc.mapped():
            async for response in stub.WatchPipelines(request):
                self._take(response)

    def _take(self, response: coordinator_pb2.WatchPipelinesResponse) -> None:
        self._slot = response.slot
        self.mesh.CopyFrom(response.mesh)
        # The first that serves; several pipelines over shared stages need a choice by load here.
        serving = (types_pb2.PIPELINE_STATE_SERVING, types_pb2.PIPELINE_STATE_DRAINING)
        pipeline = next((p for p in response.pipelines if p.state in serving), None)
        if pipeline is None:
            self._wanted = None
            self._draining = False
            self._down = all(p.state == types_pb2.PIPELINE_STATE_DOWN for p in response.pipelines)
            reasons = [p.reason for p in response.pipelines if p.reason]
            self._reason = "; ".join(reasons) or "no pipeline is formed yet"
        else:
            self._draining = pipeline.state == types_pb2.PIPELINE_STATE_DRAINING
            self._down = False
            self._wanted = pipeline
        if self._loop is not None and (pipeline is None or not self._is_at(self._loop, pipeline)):
            reason = self._reason if pipeline is None else f"{pipeline.pipeline_id} is at epoch {pipeline.epoch} now"
            self._loop.fail(StageLost(reason))
        self._changed.set()

    async def _keep_loop(self) -> None:
        """Keeps a batch loop on the pipeline that is wanted; tries again while it cannot be opened."""
        while True:
            moving = self._moving is not None and not self._moving.done()
            if self._moving is not None and not moving:
                self._moving.result()
            over = self._draining and not self._live and not moving
            if self._loop is not None and (self._loop.lost is not None or over):
                ended, self._loop = self._loop, None
                await ended.close()
                self._renew_slot()
            wanted = self._wanted
            behind = wanted is not None and (wanted.pipeline_id, wanted.next.epoch) == self._moved
            # Behind: what was gone over to has been lost, of which the coordinator is about to hear.
            wants = wanted is not None and not behind and bool(self._live or not self._draining)
            if self._loop is None and wanted is not None and wants and self._slot:
                await self._open(wanted)
            await self._cross_if_idle()
            if wanted is not None and wanted.HasField("next") and not moving:
                self._moving = asyncio.create_task(self._move(wanted))
            self._changed.clear()
            try:
                async with asyncio.timeout(RETRY_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _open(self, view: types_pb2.PipelineView) -> None:
        work = self._work or make_work(view, self.settings)
        loop = BatchLoop(view, work, self.metrics, self._bubbles, self.recorder, self._on_crossed, self._on_lost)
        try:
            await self._load_model(view)
            await loop.start(self.settings.gateway_id, self._instance, self._slot)
            self._loop, self._work = loop, work
            if self._wanted is None or loop.key != (self._wanted.pipeline_id, self._wanted.epoch):
                raise StageLost("the pipeline changed while its sessions were opened")
            if not work.live:
                await self._cross(loop, work)
        except StagemeshError as e:
            self._not_opened(loop.key, e)
            self._reason = f"{view.pipeline_id} epoch {view.epoch} cannot be driven yet: {e.message}"
            log.warning("%s", self._reason)
            self._loop = None
            await loop.close()
            self._renew_slot()

    def _not_opened(self, key: tuple[str, int], error: StagemeshError) -> None:
        """A link of it may be gone without the coordinator knowing: it hears of it when that lasts."""
        since, _ = self._in_vain if self._in_vain is not None and self._in_vain[1] == key else (time.monotonic(), key)
        self._in_vain = since, key
        if isinstance(error, TransportError) and time.monotonic() - since > IN_VAIN_S:
            self._in_vain = None
            self._reporter.stuck(*key, f"no session can be opened: {error.message}")

    def _renew_slot(self) -> None:
        """Asks for a fresh slot: on lanes of the old one, frames that nobody waits for may still be under way."""
        self._instance, self._slot = secrets.randbits(63), 0
        if self._watching is not None:
            self._watching.cancel()

    @staticmethod
    def _is_at(loop: BatchLoop, view: types_pb2.PipelineView) -> bool:
        """Whether the loop drives the pipeline as published, or as it is about to be."""
        following = view.next.epoch if view.HasField("next") else view.epoch
        return loop.key[0] == view.pipeline_id and loop.key[1] in (view.epoch, following)

    async def _move(self, view: types_pb2.PipelineView) -> None:
        """Goes over to the pipeline's next epoch, and says so; says so again if it has."""
        key = view.pipeline_id, view.next.epoch
        loop, work = self._loop, self._work
        if loop is None or work is None or key == self._moved:
            self._reporter.moved(*key)
            return
        if loop.lost is not None or key == self._not_moved:
            return
        after = next_view(view)
        new = BatchLoop(after, work, self.metrics, self._bubbles, self.recorder, self._on_crossed, self._on_lost)
        handover = Handover(loop, new, work, view.next.copies)
        try:
            await handover.run(self.settings.gateway_id, self._instance, self._slot)
        except Exception as e:
            if not isinstance(e, StagemeshError):
                log.exception("going over failed")
            self._not_moved = key
            why = e.message if isinstance(e, StagemeshError) else f"{type(e).__name__}: {e}"
            log.warning("%s is not driven at epoch %d: %s", *key, why)
            self._reporter.moved(*key, error=why)
            await new.close()
            return
        self._loop, self._moved = new, key
        if [stage.layers for stage in after.stages] != [stage.layers for stage in view.stages]:
            work.costs.forget()
        # A token has crossed the next epoch: whatever was waited for is over.
        self._outage.recovered(*key, len(self._live), 0)
        await handover.finish()
        self._outage.moved(*key, handover.paused_s, len(self._live), handover.pages)
        self._reporter.moved(*key)
        await loop.close()

    async def _load_model(self, view: types_pb2.PipelineView) -> None:
        path = Path(self.settings.model or view.model.path)
        if self.tokenizer is None:
            self.tokenizer = await asyncio.to_thread(Tokenizer.load, path)
        if self.model is None:
            info = await asyncio.to_thread(checkpoint.inspect, path, "dummy")
            self.model = ModelCard(view.model.name, view.limits.max_model_len, info.vocab_size, int(time.time()))

    async def _cross_if_idle(self) -> None:
        """Those whose tokens were to cross have ended before they could."""
        loop, work = self._loop, self._work
        if loop is None or loop.lost is not None or loop.crossed or work is None or work.live:
            return
        try:
            await self._cross(loop, work)
        except StagemeshError as e:
            log.warning("no token has crossed %s epoch %d: %s", *loop.key, e.message)

    async def _cross(self, loop: BatchLoop, work: Work) -> None:
        """Sends a token across every stage; two, so that a decode step has run as well. Raises what ended them."""
        request = GenerationRequest(
            request_id=f"warm-up-{loop.view.epoch}-{secrets.token_hex(4)}",
            prompt=(0,),
            sampling=Sampling(temperature=0.0),
            max_tokens=2,
            deadline_s=WARM_UP_TIMEOUT_S,
        )
        self._warm_up = self._submit(request, work)
        try:
            async for _ in self._warm_up:
                pass
        finally:
            self._warm_up = None

    def _on_crossed(self, loop: BatchLoop) -> None:
        log.info("a token has crossed all %d stages of %s epoch %d", len(loop.view.stages), *loop.key)
        if self._work is not None:
            self._outage.recovered(*loop.key, len(self._live), self._work.replayed_tokens)

    def _on_lost(self, loop: BatchLoop, error: StagemeshError) -> None:
        if loop is self._loop:
            self._reason = error.message
            if self._warm_up is not None:
                self._warm_up.fail(error)
            if isinstance(error, InternalError):
                self._work = None
            elif not self._stopping:
                self._outage.lost(*loop.key, error.message, len(self._live))
            if loop.stuck:
                self._reporter.stuck(*loop.key, error.message)
        self._changed.set()

    def _give_up(self, cause: str) -> None:
        if self._work is not None:
            self._work.fail(StageLost(cause, retry_after_s=RETRY_AFTER_S))
