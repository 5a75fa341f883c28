"""Carries the core's orders out: calls the workers' Stage service with deadlines and posts what came of it.

A call belongs to one epoch of one pipeline; `Forget` cancels those of epochs that have passed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
import grpc.aio

from stagemesh import rpc
from stagemesh.errors import CheckpointError, ConfigError, StagemeshError, TransportError
from stagemesh.protos.v1 import stage_pb2, stage_pb2_grpc, types_pb2

from .. import values as v
from ..core import actions
from ..observe import events
from ..timing import CoordinatorTiming
from .views import copy_message, layer_range

log = logging.getLogger(__name__)

Post = Callable[[events.Event], None]


class OrderRunner:
    """Executes Assign, Prepare, MakeLink, Activate, Release, Forget and Disconnect; answers come through `post`."""

    def __init__(
        self, post: Post, model: types_pb2.ModelRef, limits: types_pb2.RunLimits, timing: CoordinatorTiming
    ) -> None:
        self._timing = timing
        self._post = post
        self._model = model
        self._limits = limits
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._calls: dict[asyncio.Task[None], tuple[str, int]] = {}

    def execute(self, action: actions.Action) -> None:
        """Starts an action; never waits."""
        match action:
            case actions.Assign():
                self._start(action, action.plan.stage, "assign", lambda: self._assign(action))
            case actions.Prepare():
                self._spawn(self._prepare(action), ("", 0))
            case actions.MakeLink():
                self._start(action, action.stage, "link", lambda: self._make_link(action))
            case actions.Activate():
                self._start(action, action.stage, "activate", lambda: self._activate(action))
            case actions.Release():
                self._spawn(self._release(action), ("", 0))
            case actions.Forget(pipeline_id, epoch):
                for task, (name, at) in self._calls.items():
                    if name == pipeline_id and at < epoch:
                        task.cancel()
            case actions.Disconnect(address):
                channel = self._channels.pop(address, None)
                if channel is not None:
                    self._spawn(channel.close(None), ("", 0))

    async def close(self) -> None:
        """Cancels every call and closes every channel."""
        for task in self._calls:
            task.cancel()
        if self._calls:
            await asyncio.wait(list(self._calls), timeout=self._timing.close_s)
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()

    def _stub(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = rpc.channel(address)
        return stage_pb2_grpc.StageStub(self._channels[address])

    def _spawn(self, work: Coroutine[Any, Any, None], key: tuple[str, int]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._calls[task] = key
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._calls.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            log.error("an order ended in an unexpected error", exc_info=task.exception())

    def _start(
        self,
        action: actions.Assign | actions.MakeLink | actions.Activate,
        stage: int,
        what: str,
        work: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        async def guarded() -> None:
            failed = (action.pipeline_id, action.epoch, stage, what)
            try:
                # Made here: one that is cancelled before it begins would never be awaited.
                await work()
            except grpc.RpcError as e:
                error = rpc.from_rpc_error(e)
                final = _is_final(e, error)
                self._post(events.StepFailed(*failed, error.message, final, isinstance(error, TransportError)))
            except TimeoutError:
                self._post(events.StepFailed(*failed, f"no answer to {what} in time"))
            except Exception as e:
                log.exception("an order ended in an unexpected error")
                self._post(events.StepFailed(*failed, f"{type(e).__name__}: {e}"))

        self._spawn(guarded(), (action.pipeline_id, action.epoch))

    async def _assign(self, action: actions.Assign) -> None:
        plan = action.plan
        limits = types_pb2.RunLimits(pipelines=action.shares)
        limits.MergeFrom(self._limits)
        request = stage_pb2.AssignRequest(
            key=stage_pb2.PipelineKey(pipeline_id=action.pipeline_id, epoch=action.epoch),
            stage=plan.stage,
            num_stages=action.num_stages,
            layers=layer_range(plan.layers),
            generation=plan.generation,
            model=self._model,
            limits=limits,
            beside=action.beside,
        )
        at = (action.pipeline_id, action.epoch, plan.stage)
        call = self._stub(action.address).Assign(request)
        try:
            async for response in _each(call, self._timing.assign_silence_s):
                if response.HasField("done"):
                    done = response.done
                    loaded = v.Loaded(
                        done.num_pages, done.weight_bytes, done.tensor_bytes_read, done.fingerprint, done.kv_layout
                    )
                    self._post(events.AssignDone(*at, loaded))
                    return
                self._post(events.AssignProgress(*at, response.loaded_bytes, response.total_bytes))
        finally:
            call.cancel()
        raise ValueError("the worker ended its Assign without `done`")

    async def _prepare(self, action: actions.Prepare) -> None:
        at = (action.worker_id, action.incarnation, action.layers)
        request = stage_pb2.PrepareRequest(layers=layer_range(action.layers), model=self._model, limits=self._limits)
        call = self._stub(action.address).Prepare(request)
        try:
            async for response in _each(call, self._timing.assign_silence_s):
                if response.HasField("done"):
                    self._post(events.Prepared(*at, response.done.fingerprint))
                    return
            self._post(events.PrepareFailed(*at, "it ended its Prepare without `done`"))
        except grpc.RpcError as e:
            error = rpc.from_rpc_error(e)
            self._post(events.PrepareFailed(*at, error.message, _is_final(e, error)))
        except TimeoutError:
            self._post(events.PrepareFailed(*at, "no answer to prepare in time"))
        except Exception as e:
            log.exception("an order ended in an unexpected error")
            self._post(events.PrepareFailed(*at, f"{type(e).__name__}: {e}"))
        finally:
            call.cancel()

    async def _make_link(self, action: actions.MakeLink) -> None:
        key = stage_pb2.PipelineKey(pipeline_id=action.pipeline_id, epoch=action.epoch)
        copy = copy_message(action.copy) if action.copy is not None else None
        offer = await self._stub(action.receiver_address).OfferLink(
            stage_pb2.OfferLinkRequest(
                key=key,
                stage=action.receiver_stage,
                transport=action.transport,
                sender_addresses=action.sender_rank_addresses,
                nonces=action.nonces,
                tokens=action.tokens,
                copy=copy,
            ),
            timeout=self._timing.offer_s,
        )
        if not len(offer.receiver_addresses) == len(offer.secrets) == len(action.nonces):
            raise ValueError(
                f"worker {action.receiver_id} offered {len(offer.receiver_addresses)} addresses and "
                f"{len(offer.secrets)} secrets for {len(action.nonces)} ranks"
            )
        connected = await self._stub(action.sender_address).ConnectLink(
            stage_pb2.ConnectLinkRequest(
                key=key,
                stage=action.stage,
                transport=action.transport,
                receiver_addresses=offer.receiver_addresses,
                secrets=offer.secrets,
                nonces=action.nonces,
                receiver_id=action.receiver_id,
                tokens=action.tokens,
                copy=copy,
            ),
            timeout=self._timing.connect_s,
        )
        route = connected.route or action.transport
        index = action.copy.index if action.copy is not None else None
        self._post(events.LinkUp(action.pipeline_id, action.epoch, action.stage, route, index))

    async def _activate(self, action: actions.Activate) -> None:
        key = stage_pb2.PipelineKey(pipeline_id=action.pipeline_id, epoch=action.epoch)
        request = stage_pb2.ActivateRequest(key=key, stage=action.stage)
        await self._stub(action.address).Activate(request, timeout=self._timing.activate_s)
        self._post(events.Activated(action.pipeline_id, action.epoch, action.stage))

    async def _release(self, action: actions.Release) -> None:
        key = stage_pb2.PipelineKey(pipeline_id=action.pipeline_id, epoch=action.epoch)
        request = stage_pb2.ReleaseRequest(key=key, reason=action.reason, alone=action.alone)
        try:
            await self._stub(action.address).Release(request, timeout=self._timing.release_s)
        except grpc.RpcError as e:
            log.info("worker %s did not take its release: %s", action.worker_id, rpc.from_rpc_error(e).message)


def _is_final(call: grpc.RpcError, error: StagemeshError) -> bool:
    """Whether the same worker would fail the same way again."""
    return isinstance(error, (ConfigError, CheckpointError)) or call.code() is grpc.StatusCode.FAILED_PRECONDITION


async def _each(call: Any, silence_s: float) -> AsyncIterator[Any]:
    """The messages of a call; TimeoutError when one takes longer than `silence_s`."""
    messages = aiter(call)
    while True:
        async with asyncio.timeout(silence_s):
            try:
                message = await anext(messages)
            except StopAsyncIteration:
                return
        yield message
