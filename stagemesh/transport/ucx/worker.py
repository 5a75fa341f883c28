"""A UCX worker with its pending sends and receives."""

from __future__ import annotations

import importlib
import os
from typing import Any

from stagemesh.errors import TransportError

from ..base import Buffer, cuda_bytes, host_view, is_cuda
from ..mailbox import cancelled

FULL_MASK = (1 << 64) - 1
_MAX_SPINS = 64
_CLOSE_TURNS = 64


def load_ucxx() -> Any:
    """Imports ucxx's extension module.

    Raises:
        TransportError: ucxx is not installed, or cannot be loaded. The cause says why.
    """
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # UCX reads it once, at load.
    asked = os.environ.get("UCX_RNDV_THRESH")
    try:
        return importlib.import_module("ucxx._lib.libucxx")
    except ImportError as error:
        raise TransportError(f"ucxx is not installed (pip install 'stagemesh[ucx-cu12]'): {error}") from error
    finally:
        if asked is None:  # ucxx sets its own value, for this process and its children.
            os.environ.pop("UCX_RNDV_THRESH", None)


class UcxRequest:
    """A `Request` of UCX. It keeps the buffer until UCX is done with it."""

    __slots__ = ("_buffer", "_cancelled", "_done", "_error", "_raw", "_worker", "canceller_open", "nbytes", "tag")

    def __init__(self, worker: UcxWorker, raw: Any, buffer: Any, nbytes: int, tag: int | None) -> None:
        self._worker, self._raw, self._buffer = worker, raw, buffer
        self.nbytes = nbytes
        self.tag = tag  # Only of a receive.
        self.canceller_open = False  # Whether the message that cancels it is still under way.
        self._done = self._cancelled = False
        self._error: TransportError | None = None

    @property
    def done(self) -> bool:
        if not self._done and self._raw.completed:
            self._finish()
        return self._done

    @property
    def error(self) -> TransportError | None:
        return self._error if self.done else None

    def cancel(self) -> None:
        """See `Request.cancel`. The tag must not be used again before this is done."""
        if self.tag is not None and not self._cancelled and not self.done:
            self._cancelled = self.canceller_open = True
            self._worker.send_canceller(self, self.tag)

    def _finish(self) -> None:
        try:
            self._raw.check_error()
        except self._worker.lib.UCXError as error:
            self.canceller_open = False
            if self._cancelled:
                self._error = cancelled()
            elif "Truncated" in type(error).__name__:
                self._error = TransportError(f"a message was longer than its buffer of {self.nbytes} bytes")
            else:
                self._error = TransportError(f"UCX: {error}")
            self._error.__cause__ = error
        if self.canceller_open and self.tag is not None:
            # The real message came first. The cancelling message must not match a later receive.
            self._worker.discard(self.tag, FULL_MASK)
            if self.canceller_open:
                return
        self._done = True
        self._buffer = None
        self._worker.forget(self)


class UcxWorker:
    """One UCX context with one worker, driven by `progress`.

    Args:
        config: UCX's options without the `UCX_` prefix.
        wakeup: whether the worker has `fd` and `arm`, for sleeping.

    Raises:
        TransportError: ucxx is missing, or UCX cannot be initialised with these options.
    """

    def __init__(self, config: dict[str, str], *, wakeup: bool = True) -> None:
        self.lib = load_ucxx()
        self._array_of = importlib.import_module("ucxx._lib.arr").Array
        feature = self.lib.Feature
        try:
            features = (feature.TAG, feature.WAKEUP) if wakeup else (feature.TAG,)
            self._context = self.lib.UCXContext(config_dict=config, feature_flags=features)
            self._worker = self.lib.UCXWorker(self._context)
            if wakeup:
                self._worker.init_blocking_progress_mode()
        except self.lib.UCXError as error:
            raise TransportError(f"UCX cannot be initialised with {config}: {error}") from error
        self._tag, self._mask = self.lib.UCXXTag, self.lib.UCXXTagMask
        self.address: bytes = self.lib.UCXAddress.create_from_worker(self._worker).tobytes()
        self.resources: str = self._context.info
        """UCX's description of the context, which lists its transports."""
        self._under_way: dict[int, UcxRequest] = {}
        self._cancelling: dict[int, UcxRequest] = {}  # Receives by tag, whose cancelling message is still under way.
        self._to_self: Any = None

    @property
    def fd(self) -> int:
        """Descriptor to sleep on after `arm`."""
        return int(self._worker.epoll_file_descriptor)

    def arm(self) -> bool:
        """See `Transport.arm`."""
        return bool(self._worker.arm())

    def progress(self) -> bool:
        """See `Transport.progress`."""
        spins = 0
        while spins < _MAX_SPINS and self._worker.progress_once():
            spins += 1
        return spins > 0

    def endpoint(self, ucx_address: bytes) -> Any:
        """Makes ucxx's endpoint to the worker with that address. Raises TransportError."""
        try:
            address = self.lib.UCXAddress.create_from_buffer(bytearray(ucx_address))
            return self.lib.UCXEndpoint.create_from_worker_address(self._worker, address, True)
        except self.lib.UCXError as error:
            raise TransportError(f"UCX cannot reach the peer: {error}") from error

    def send(self, endpoint: Any, tag: int, buffer: Buffer) -> UcxRequest:
        """See `Peer.send`."""
        array, nbytes = self._array(buffer, writable=False)
        return self._track(endpoint.tag_send(array, self._tag(tag)), (array, buffer), nbytes, None)

    def recv(self, tag: int, buffer: Buffer) -> UcxRequest:
        """See `Transport.recv`."""
        array, nbytes = self._array(buffer, writable=True)
        return self._track(self._worker.tag_recv(array, self._tag(tag)), (array, buffer), nbytes, tag)

    def probe(self, tag: int) -> bool:
        """See `Transport.probe`."""
        return bool(self._worker.tag_probe(self._tag(tag)).matched)

    def discard(self, tag: int, mask: int) -> int:
        """See `Transport.discard`. Messages that cancel a receive are dropped, too, but not counted."""
        dropped = 0
        while (found := self._worker.tag_probe(self._tag(tag & mask), self._mask(mask), True)).matched:
            self._drop(found)
            cancelling = self._cancelling.get(found.sender_tag)
            if cancelling is not None and found.length == cancelling.nbytes + 1:
                cancelling.canceller_open = False
                del self._cancelling[found.sender_tag]
            else:
                dropped += 1
        return dropped

    def sweep(self) -> None:
        """Releases the buffers of completed requests that their owners have not checked."""
        for request in list(self._under_way.values()):
            _ = request.done

    def forget(self, request: UcxRequest) -> None:
        """Removes a request that is done."""
        self._under_way.pop(id(request), None)
        if request.tag is not None and self._cancelling.get(request.tag) is request:
            del self._cancelling[request.tag]

    def send_canceller(self, request: UcxRequest, tag: int) -> None:
        """Sends this worker a message that ends the receive with that tag."""
        if self._to_self is None:
            self._to_self = self.endpoint(self.address)
        self._cancelling[tag] = request
        self.send(self._to_self, tag, bytearray(request.nbytes + 1))

    def close(self) -> None:
        """Ends pending requests and the worker. Endpoints must have been closed before."""
        for _ in range(_CLOSE_TURNS):
            self.progress()
        self.discard(0, 0)  # Otherwise ucxx would fetch unexpected messages, and wait for senders that are gone.
        if self._to_self is not None and self._to_self.alive:
            self._to_self.close_blocking()
        self._worker.cancel_inflight_requests()
        for _ in range(_CLOSE_TURNS):
            if not self._under_way:
                break
            self.progress()
            self.sweep()
        self._to_self = None
        del self._worker, self._context

    def _drop(self, found: Any) -> None:
        """Removes a probed message from the queue. A buffer of one byte is enough: UCX drops bytes that do not fit, and
        does not fetch a rendezvous."""
        scratch = bytearray(1)
        array = self._array_of(scratch)
        self._track(self._worker.tag_recv_with_handle(array, found), (array, scratch), 1, None)

    def _track(self, raw: Any, buffer: Any, nbytes: int, tag: int | None) -> UcxRequest:
        """Keeps request and buffer until UCX has completed the request, even if the caller drops it."""
        request = UcxRequest(self, raw, buffer, nbytes, tag)
        if not request.done:
            self._under_way[id(request)] = request
        return request

    def _array(self, buffer: Buffer, *, writable: bool) -> tuple[Any, int]:
        """Returns ucxx's view of a contiguous buffer, and its size in bytes."""
        view = cuda_bytes(buffer) if is_cuda(buffer) else host_view(buffer)
        if isinstance(view, memoryview) and view.readonly:
            if writable:
                raise TransportError("a receive needs a writable buffer, got a read-only one")
            view = memoryview(bytearray(view))
        return self._array_of(view), view.nbytes
