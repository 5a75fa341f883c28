"""The gateway's engine: it follows the coordinator, drives every pipeline, and spreads requests over them.

It is ready only when a token has crossed every stage of a pipeline at its current epoch.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from stagemesh import checkpoint, rpc
from stagemesh.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    StagemeshError,
    Unavailable,
    ungrouped,
)
from stagemesh.hub.checkpoint import open_model
from stagemesh.hub.reference import HubModel
from stagemesh.hub.timing import HubTiming
from stagemesh.protocol import PROTOCOL
from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2
from stagemesh.settings.gateway import GatewaySettings

from .api.request import GenerationRequest, ServedModel
from .drive.driver import PipelineDriver, Surroundings
from .drive.live import LiveRequest
from .drive.loop import Observers
from .drive.outage import KEPT
from .schedule.scheduler import Scheduler
from .session.reporter import Reporter
from .session.slot_lease import SlotLease
from .telemetry.metrics import Metrics
from .telemetry.trace import Recorder
from .text.tokenizer import Tokenizer
from .timing import GatewayTiming

log = logging.getLogger(__name__)

NO_COORDINATOR = "no coordinator has been reached yet"


class MeshEngine:
    """Implements `request.Engine` on a real mesh."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics, timing: GatewayTiming) -> None:
        self.settings = settings
        self._timing = timing
        self.metrics = metrics
        self.model: ServedModel | None = None
        self.mesh = types_pb2.MeshView()
        self.recorder = Recorder()
        self._slot = SlotLease(settings.gateway_id, self._watch_anew)
        self._watching: asyncio.Task[None] | None = None
        self._reporter = Reporter(settings.coordinator, settings.gateway_id, timing)
        self._drivers: dict[str, PipelineDriver] = {}
        """Pipeline -> its driver."""
        self._reason = NO_COORDINATOR
        """Text on why no pipeline is driven."""
        self._stopping = False
        self._live: dict[str, LiveRequest] = {}
        self._group = asyncio.TaskGroup()
        self._source: Path | HubModel | None = None
        """The checkpoint's folder, or its model on a hub, once reading it has begun."""
        self._checkpoint: tuple[Tokenizer, int]
        """Its tokenizer, and the size of its vocabulary."""
        self._checkpoint_read = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._events: deque[dict[str, Any]] = deque(maxlen=KEPT)
        observers = Observers(metrics, self.recorder, timing, time.monotonic)
        self._around = Surroundings(
            settings, self._slot, self._reporter, observers, self._events, self._load_model, self._place
        )
        metrics.running.set_function(lambda: sum(len(s.running) for s in self._schedulers))
        metrics.waiting.set_function(lambda: sum(len(s.waiting) for s in self._schedulers))
        metrics.kv_cache_usage.set_function(lambda: max((s.pages.usage for s in self._schedulers), default=0.0))
        metrics.steps_in_flight.set_function(lambda: sum(len(s.out) for s in self._schedulers))

    # -- start and stop ---------------------------------------------------------------------------------------------

    def start(self) -> asyncio.Task[None]:
        """Starts following the coordinator. Only a bug, or a CheckpointError, ends the task: as its exception."""
        self._following = asyncio.create_task(self._follow())
        return self._following

    async def _follow(self) -> None:
        with ungrouped():
            async with self._group as group:
                group.create_task(self._watch())
                group.create_task(self._reporter.run())
                group.create_task(self._report_steps())

    async def stop(self, drain_timeout_s: float) -> None:
        """Takes no new requests, lets live ones finish for up to `drain_timeout_s`, then closes all drivers."""
        self._stopping = True
        deadline = time.monotonic() + drain_timeout_s
        while self._live and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        drivers = list(self._drivers.values())
        for driver in drivers:
            driver.stop()
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        for driver in drivers:
            await driver.close()

    # -- calls of the APIs ------------------------------------------------------------------------------------------

    def ready(self) -> tuple[bool, str]:
        """Whether a token has crossed every stage of a pipeline that serves, and if not, why."""
        if self._stopping:
            return False, "the gateway is stopping"
        drivers = self._drivers.values()
        if any(driver.ready for driver in drivers):
            return True, ""
        reasons = [f"a stage is being drained: {d.reason}" if d.wish.draining else d.reason for d in drivers]
        return False, "; ".join(dict.fromkeys(reasons)) or self._reason

    def submit(self, request: GenerationRequest) -> LiveRequest:
        """Queues a request, which then ends exactly once. While a lost stage is being replaced, it waits in the queue.

        Raises Unavailable, QueueFull or InvalidRequest.
        """
        driver = self._least_busy() or next((d for d in self._drivers.values() if d.recovering), None)
        if driver is None or driver.ledger is None or self.model is None or self._stopping:
            raise Unavailable(f"no pipeline can serve now: {self.ready()[1]}", retry_after_s=self._timing.retry_after_s)
        if request.request_id in self._live:
            raise InvalidRequest(f"a request named {request.request_id} is running", param="request_id")
        scheduler = driver.ledger.scheduler
        most = self.settings.max_waiting + scheduler.max_num_seqs
        if request.n > most:
            raise InvalidRequest(f"n is {request.n}, and this gateway holds at most {most} choices at once", param="n")
        waiting = len(scheduler.waiting)
        if waiting + request.n > most - len(scheduler.running):
            raise QueueFull(
                f"{waiting} requests are waiting, and at most {self.settings.max_waiting} may",
                retry_after_s=self._timing.retry_after_s,
            )
        live = LiveRequest(request, self.model.tokenizer, self.metrics, self._on_end)
        log.debug("request %s draws with seed %d", request.request_id, request.sampling.seed)
        if not live.ended:  # A resumed stream may already have all of its tokens.
            late = DeadlineExceeded(f"request {request.request_id} took longer than {request.deadline_s:g} s")
            live.deadline = asyncio.get_running_loop().call_later(request.deadline_s, live.fail, late)
            self._live[request.request_id] = live
            driver.accept(live)
        return live

    def _least_busy(self) -> PipelineDriver | None:
        """The serving pipeline with the fewest sequences."""
        ready = (driver for driver in self._drivers.values() if driver.ready)
        return min(ready, key=lambda d: sum(d.load), default=None)

    def _on_end(self, live: LiveRequest) -> None:
        self._live.pop(live.request.request_id, None)
        for driver in self._drivers.values():
            driver.forget(live)

    def cancel(self, request_id: str) -> bool:
        """Cancels a request by its id. Returns False if it is not running."""
        live = self._live.get(request_id)
        if live is None:
            return False
        live.cancel()
        return True

    def describe(self) -> dict[str, object]:
        """The mesh as this gateway sees it, as values for JSON."""
        ready, reason = self.ready()
        loads = {n: {"running": d.load[0], "waiting": d.load[1], "ready": d.ready} for n, d in self._drivers.items()}
        seen: dict[str, Any] = MessageToDict(
            self.mesh, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return {
            "ready": ready,
            "reason": reason,
            "gateway": {
                "id": self.settings.gateway_id,
                "coordinator": self.settings.coordinator,
                "running": sum(load["running"] for load in loads.values()),
                "waiting": sum(load["waiting"] for load in loads.values()),
                "steps_in_flight": sum(len(s.out) for s in self._schedulers),
                "free_pages": sum(s.pages.num_free for s in self._schedulers),
                "total_pages": sum(s.pages.num_pages for s in self._schedulers),
                "pipelines": loads,
            },
            "events": list(self._events),
            **seen,
        }

    @property
    def _schedulers(self) -> list[Scheduler]:
        return [driver.ledger.scheduler for driver in self._drivers.values() if driver.ledger is not None]

    # -- following the coordinator ----------------------------------------------------------------------------------

    def _watch_anew(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self) -> None:
        """Watches the mesh. While the coordinator is away, running requests go on."""
        channel = rpc.channel(self.settings.coordinator)
        stub = coordinator_pb2_grpc.CoordinatorStub(channel)
        try:
            while True:
                self._watching = asyncio.create_task(self._watch_once(stub))
                try:
                    await asyncio.wait((self._watching,))
                    if self._watching.cancelled():
                        continue  # The watch starts again to get a new slot.
                    self._watching.result()
                except StagemeshError as e:
                    away = f"the coordinator at {self.settings.coordinator} cannot be reached"
                    reason = e.message if isinstance(e, ConfigError) else away
                    if reason != self._reason:
                        log.warning("no coordinator at %s: %s", self.settings.coordinator, e.message)
                    self._reason = reason
                    for driver in self._drivers.values():
                        if driver.loop is None:
                            driver.reason = self._reason
                finally:
                    self._watching.cancel()
                await asyncio.sleep(self._timing.retry_s)
        finally:
            await channel.close(None)

    async def _watch_once(self, stub: coordinator_pb2_grpc.CoordinatorStub) -> None:
        """Follows one watch stream until the coordinator ends it. Raises its error, or Unavailable."""
        request = coordinator_pb2.WatchPipelinesRequest(
            gateway_id=self.settings.gateway_id,
            instance=self._slot.instance,
            protocol=PROTOCOL,
            life=self._slot.life,
        )
        with rpc.mapped():
            async for response in stub.WatchPipelines(request):
                self.take(response)

    def take(self, response: coordinator_pb2.WatchPipelinesResponse) -> None:
        """Takes the mesh that the coordinator sent."""
        self._slot.slot, self._reason = response.slot, "no pipeline is formed yet"
        # Replaced and not copied into: a protobuf message never frees the memory of its fields.
        self.mesh = response.mesh
        if response.pipelines and self._needs(response.pipelines[0].model):
            self._checkpoint_read.clear()
            self._source = _source_of(response.pipelines[0].model)
            self._group.create_task(self.read_checkpoint(self._source))
        here = {view.pipeline_id: view for view in response.pipelines}
        for name in here.keys() - self._drivers.keys():
            self._drivers[name] = driver = PipelineDriver(name, self._around)
            driver.task = self._group.create_task(driver.run())
        for name, driver in self._drivers.items():
            driver.follow(here.get(name))

    def _place(self) -> None:
        """Moves requests that a pipeline gives up to another one. Forgets removed pipelines that hold no requests."""
        for name, driver in list(self._drivers.items()):
            to = self._least_busy()
            if driver.gives_up and to is not None and to is not driver:
                for live in driver.hand_out(to.pipeline_id):
                    to.accept(live)
            if driver.left and driver.wish.view is None:
                driver.outage.close()
                del self._drivers[name]
                driver.task.cancel()

    async def _report_steps(self) -> None:
        """Reports step times to the coordinator while requests run."""
        while True:
            await asyncio.sleep(self._timing.steps_every_s)
            for driver in self._drivers.values():
                loop, ledger = driver.loop, driver.ledger
                if loop is None or ledger is None or loop.lost is not None or ledger.recovering or not ledger.live:
                    continue
                seconds = ledger.costs.typical_s()
                if seconds is not None and len(seconds) == len(loop.view.stages):
                    self._reporter.steps(*loop.key, seconds)

    def _needs(self, model: types_pb2.ModelRef) -> bool:
        """Whether this model's tokenizer must be read: none was yet, or that of another commit."""
        if isinstance(self._source, HubModel) and self.model is None and model.repo:
            return self._source.commit != model.commit
        return self._source is None

    async def read_checkpoint(self, source: Path | HubModel) -> None:
        """Reads the tokenizer and what belongs to it. Without `--model` the source is known when a pipeline is seen.

        Raises ConfigError, CheckpointError and Unavailable. This ends the gateway: a later try is its supervisor's.
        """
        self._source = source
        if isinstance(source, HubModel):
            found = await asyncio.to_thread(open_model, source, HubTiming().scaled(self.settings.time_scale))
            folder, self._source = await asyncio.to_thread(found.fetch_text), found.model
        else:
            folder = source
        tokenizer = await asyncio.to_thread(Tokenizer, folder)
        vocab_size = (await asyncio.to_thread(checkpoint.inspect, folder, "dummy")).vocab_size
        self._checkpoint = tokenizer, vocab_size
        self._checkpoint_read.set()

    async def _load_model(self, view: types_pb2.PipelineView) -> None:
        """Makes the served model when its first pipeline is opened. Waits for `read_checkpoint`."""
        await self._checkpoint_read.wait()
        if self.model is None:
            tokenizer, vocab_size = self._checkpoint
            limit = view.limits.max_model_len
            self.model = ServedModel(view.model.name, limit, vocab_size, int(time.time()), tokenizer)


def _source_of(model: types_pb2.ModelRef) -> Path | HubModel:
    return HubModel(model.repo, model.commit) if model.repo else Path(model.path)
