"""Executes the core's orders: calls the workers' Stage service with deadlines and posts the results as events.

A call belongs to one epoch of one pipeline. `Forget` cancels calls of epochs that have passed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
import grpc.aio

from stagemesh import rpc
from stagemesh.errors import CheckpointError, ConfigError, TransportError
from stagemesh.protos.v1 import stage_pb2, stage_pb2_grpc

from ..core.actions import Disconnect, Forget
from ..observe.events import Answered, Event, Failed
from ..timing import CoordinatorTiming
from ..values import Order, StageRequest

log = logging.getLogger(__name__)


class OrderRunner:
    """Executes Order, Forget and Disconnect. Passes answers to `post`."""

    def __init__(self, post: Callable[[Event], None], timing: CoordinatorTiming) -> None:
        self._post = post
        self._close_s = timing.close_s
        self._limits_s: dict[type[StageRequest], float] = {
            stage_pb2.AssignRequest: timing.assign_silence_s,
            stage_pb2.PrepareRequest: timing.assign_silence_s,
            stage_pb2.OfferLinkRequest: timing.offer_s,
            stage_pb2.ConnectLinkRequest: timing.connect_s,
            stage_pb2.ActivateRequest: timing.activate_s,
            stage_pb2.ReleaseRequest: timing.release_s,
        }
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._calls: dict[asyncio.Task[None], tuple[str, int] | None] = {}

    def execute(self, action: Order | Forget | Disconnect) -> None:
        """Starts an action. Never waits."""
        match action:
            case Order():
                self._spawn(self._carry_out(action), action.attempt)
            case Forget(pipeline_id, epoch):
                for task, attempt in self._calls.items():
                    if attempt is not None and attempt[0] == pipeline_id and attempt[1] < epoch:
                        task.cancel()
            case Disconnect(address):
                channel = self._channels.pop(address, None)
                if channel is not None:
                    self._spawn(channel.close(None))

    async def close(self) -> None:
        """Cancels every call and closes every channel."""
        for task in self._calls:
            task.cancel()
        if self._calls:
            await asyncio.wait(list(self._calls), timeout=self._close_s)
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()

    def _spawn(self, work: Coroutine[Any, Any, None], attempt: tuple[str, int] | None = None) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._calls[task] = attempt
        task.add_done_callback(self._calls.pop)

    async def _carry_out(self, order: Order) -> None:
        try:
            await self._call(order)
        except grpc.RpcError as e:
            error = rpc.from_rpc_error(e)
            # The same worker would fail the same way again.
            final = isinstance(error, ConfigError | CheckpointError) or e.code() is grpc.StatusCode.FAILED_PRECONDITION
            self._post(Failed(order, error.message, final, isinstance(error, TransportError)))
        except TimeoutError:
            self._post(Failed(order, f"no answer to {order.what} in time"))
        except Exception as e:
            log.exception("an order ended in an unexpected error")
            self._post(Failed(order, f"{type(e).__name__}: {e}"))

    async def _call(self, order: Order) -> None:
        """Posts each answer. Raises RpcError, TimeoutError, and ValueError for an answer that breaks the protocol."""
        request = order.request
        if order.offer is not None and isinstance(request, stage_pb2.ConnectLinkRequest):
            request = await self._offered(order.offer, request)
        method, limit_s = self._method(order), self._limits_s[type(request)]
        if not isinstance(request, stage_pb2.AssignRequest | stage_pb2.PrepareRequest):
            self._post(Answered(order, await method(request, timeout=limit_s)))
            return
        call = method(request)
        responses, is_done = aiter(call), False
        try:
            while not is_done:
                async with asyncio.timeout(limit_s):
                    response = await anext(responses, None)
                if response is None:
                    raise ValueError(f"the worker ended its {order.what} without `done`")
                self._post(Answered(order, response))
                is_done = response.HasField("done")
        finally:
            call.cancel()

    async def _offered(self, offer: Order, connect: stage_pb2.ConnectLinkRequest) -> stage_pb2.ConnectLinkRequest:
        """Calls the receiver of a link, and adds the addresses and secrets that it offers to the sender's request."""
        answer = await self._method(offer)(offer.request, timeout=self._limits_s[type(offer.request)])
        if not len(answer.receiver_addresses) == len(answer.secrets) == len(connect.nonces):
            raise ValueError(
                f"worker {offer.to.worker_id} offered {len(answer.receiver_addresses)} addresses and "
                f"{len(answer.secrets)} secrets for {len(connect.nonces)} ranks"
            )
        whole = stage_pb2.ConnectLinkRequest(receiver_addresses=answer.receiver_addresses, secrets=answer.secrets)
        whole.MergeFrom(connect)
        return whole

    def _method(self, order: Order) -> Any:
        """The worker's RPC for the order's request."""
        address = order.to.address
        if address not in self._channels:
            self._channels[address] = rpc.channel(address)
        stub = stage_pb2_grpc.StageStub(self._channels[address])
        return getattr(stub, type(order.request).__name__.removesuffix("Request"))
