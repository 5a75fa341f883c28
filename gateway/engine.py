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
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    StageLost,
    StagemeshError,
    Unavailable,
)
from stagemesh.protos.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2

from .batch_loop import BatchLoop
from .bubbles import Bubbles
from .live import LiveRequest
from .lookup import lookup_limits
from .metrics import Load, Metrics
from .request import GenerationRequest, ModelCard, Sampling
from .tokenizer import Tokenizer
from .trace import Recorder

log = logging.getLogger(__name__)

RETRY_S = 0.2
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
        self._crossed: tuple[str, int] | None = None
        """Pipeline and epoch of which a token has crossed every stage."""
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

    async def stop(self, drain_timeout_s: float) -> None:
        """Takes nothing new, lets live requests finish for a while, then ends."""
        self._stopping = True
        deadline = time.monotonic() + drain_timeout_s
        while self._live and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        if self._loop is not None:
            await self._loop.close()

    # -- the front ends' side ---------------------------------------------------------------------------------------

    def ready(self) -> tuple[bool, str]:
        """Whether a token has crossed every stage of the pipeline that serves; else why not."""
        if self._stopping:
            return False, "the gateway is stopping"
        if self._draining:
            return False, f"a stage is being drained: {self._reason}"
        if self._loop is not None and self._loop.lost is None and self._loop.key == self._crossed:
            return True, ""
        return False, self._reason

    def submit(self, request: GenerationRequest) -> LiveRequest:
        """Accepts a request into the queue: from here on it ends exactly once.

        Raises Unavailable, QueueFull, PromptTooLong or InvalidRequest.
        """
        ready, reason = self.ready()
        if not ready or self._loop is None or self.model is None:
            raise Unavailable(f"no pipeline can serve now: {reason}", retry_after_s=RETRY_AFTER_S)
        if len(request.prompt) + request.max_tokens > self.model.max_model_len:
            raise PromptTooLong(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} output tokens exceed the longest "
                f"sequence of {self.model.max_model_len} tokens",
                param="max_tokens",
            )
        if request.request_id in self._live:
            raise InvalidRequest(f"a request named {request.request_id} is running", param="request_id")
        most = self.settings.max_waiting + self._loop.scheduler.max_num_seqs
        if request.n > most:
            raise InvalidRequest(f"n is {request.n}, and this gateway holds at most {most} choices at once", param="n")
        waiting = self._loop.num_waiting
        if waiting + request.n > most - self._loop.num_running:
            raise QueueFull(
                f"{waiting} requests are waiting, and at most {self.settings.max_waiting} may",
                retry_after_s=RETRY_AFTER_S,
            )
        return self._submit(request, self._loop)

    def _submit(self, request: GenerationRequest, loop: BatchLoop) -> LiveRequest:
        assert self.tokenizer is not None
        seed = request.sampling.seed
        if seed is None:
            seed = secrets.randbits(32)
            log.debug("request %s draws with seed %d", request.request_id, seed)
        live = LiveRequest(request, seed % 2**64, self.tokenizer, self.metrics, self._on_end)
        bound_s = min(request.deadline_s or self.settings.request_timeout, self.settings.request_timeout)
        live.deadline = asyncio.get_running_loop().call_later(
            bound_s, live.fail, DeadlineExceeded(f"request {request.request_id} took longer than {bound_s:g} s")
        )
        self._live[request.request_id] = live
        loop.add(live)
        return live

    def _on_end(self, live: LiveRequest) -> None:
        self._live.pop(live.request.request_id, None)
        if self._loop is not None:
            self._loop.remove(live)

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
        scheduler = self._loop.scheduler if self._loop is not None and self._loop.lost is None else None
        seen: dict[str, Any] = MessageToDict(
            self.mesh, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return {
            "ready": ready,
            "reason": reason,
            "gateway": {
                "id": self.settings.gateway_id,
                "running": load.running,
                "waiting": load.waiting,
                "steps_in_flight": load.steps_in_flight,
                "free_pages": scheduler.pages.num_free if scheduler else 0,
                "total_pages": scheduler.pages.num_pages if scheduler else 0,
            },
            **seen,
        }

    def _load(self) -> Load:
        loop = self._loop
        if loop is None or loop.lost is not None:
            return Load()
        pages = loop.scheduler.pages
        return Load(loop.num_running, loop.num_waiting, 1 - pages.num_free / pages.num_pages, len(loop.scheduler.out))

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

    async def _watch_once(self, stub: coordinator_pb2_grpc.CoordinatorStub) -> None:
        """One stream of the mesh, until the coordinator ends it. Raises its error, or Unavailable."""
        request = coordinator_pb2.WatchPipelinesRequest(gateway_id=self.settings.gateway_id, instance=self._instance)
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
            reasons = [p.reason for p in response.pipelines if p.reason]
            self._reason = "; ".join(reasons) or "no pipeline is formed yet"
        else:
            self._draining = pipeline.state == types_pb2.PIPELINE_STATE_DRAINING
            self._wanted = pipeline
        if self._loop is not None and (pipeline is None or self._loop.key != (pipeline.pipeline_id, pipeline.epoch)):
            reason = self._reason if pipeline is None else f"{pipeline.pipeline_id} is at epoch {pipeline.epoch} now"
            self._loop.fail(StageLost(reason))
        self._changed.set()

    async def _keep_loop(self) -> None:
        """Keeps a batch loop on the pipeline that is wanted; tries again while it cannot be opened."""
        while True:
            if self._loop is not None and (self._loop.lost is not None or (self._draining and not self._live)):
                ended, self._loop = self._loop, None
                await ended.close()
                self._renew_slot()
            wanted = self._wanted
            if self._loop is None and wanted is not None and self._slot and not self._draining:
                await self._open(wanted)
            self._changed.clear()
            try:
                async with asyncio.timeout(RETRY_S):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _open(self, view: types_pb2.PipelineView) -> None:
        loop = BatchLoop(view, self.metrics, self._bubbles, self.recorder, self._on_lost)
        try:
            await self._load_model(view)
            caching, lookup = self.settings.enable_prefix_caching, lookup_limits(self.settings.speculative_config)
            await loop.start(
                self.settings.gateway_id, self._instance, self._slot, prefix_caching=caching, lookup=lookup
            )
            if self._wanted is None or loop.key != (self._wanted.pipeline_id, self._wanted.epoch):
                raise StageLost("the pipeline changed while its sessions were opened")
            self._loop = loop
            await self._cross(loop)
        except StagemeshError as e:
            self._reason = f"{view.pipeline_id} epoch {view.epoch} cannot be driven yet: {e.message}"
            log.warning("%s", self._reason)
            self._loop = None
            await loop.close()
            self._renew_slot()

    def _renew_slot(self) -> None:
        """Asks for a fresh slot: on lanes of the old one, frames that nobody waits for may still be under way."""
        self._instance, self._slot = secrets.randbits(63), 0
        if self._watching is not None:
            self._watching.cancel()

    async def _load_model(self, view: types_pb2.PipelineView) -> None:
        path = Path(self.settings.model or view.model.path)
        if self.tokenizer is None:
            self.tokenizer = await asyncio.to_thread(Tokenizer.load, path)
        if self.model is None:
            info = await asyncio.to_thread(checkpoint.inspect, path, "dummy")
            self.model = ModelCard(view.model.name, view.limits.max_model_len, info.vocab_size, int(time.time()))

    async def _cross(self, loop: BatchLoop) -> None:
        """Sends a token across every stage; two, so that a decode step has run as well. Raises what ended them."""
        request = GenerationRequest(
            request_id=f"warm-up-{loop.view.epoch}-{secrets.token_hex(4)}",
            prompt=(0,),
            sampling=Sampling(temperature=0.0),
            max_tokens=2,
            deadline_s=WARM_UP_TIMEOUT_S,
        )
        async for _ in self._submit(request, loop):
            pass
        self._crossed = loop.key
        log.info("a token has crossed all %d stages of %s epoch %d", len(loop.view.stages), *loop.key)

    def _on_lost(self, loop: BatchLoop, error: StagemeshError) -> None:
        if loop is self._loop:
            self._reason = error.message
            log.warning("%s epoch %d is lost: %s", *loop.key, error.message)
        self._changed.set()
