"""UCX by ucxx: shared memory on one host, RDMA or TCP between hosts, cuda_ipc between CUDA memories.

What had to be known (each was seen here, ucxx 0.52 with UCX 1.21):
- Endpoints with error handling take TCP even on one host unless `MM_ERROR_HANDLING=y`: so that is set, and
  `Peer.route` is read from the endpoint, not from the settings.
- Shared memory does not notice that a peer was killed. A peer of the same host and PID namespace is therefore watched
  by a pidfd; others by UCX (TCP resets, keep-alive).
- One that is killed in the midst of a send may leave the receiver deaf to all others: see `ucx_ear`.
- A receive cannot be cancelled alone: a message to oneself under its tag, longer than its buffer, ends it as truncated
  and writes nothing, unless the real message was first; then the late one is found again and dropped.
- ucxx tells when a message was longer than its buffer, but neither its size nor that it was shorter.
- Destroying a worker fetches what nobody took, and waits for its senders for ever if they are gone: so `close` drops it
  first, and runs at the latest when the process ends or the transport is garbage.
- `import ucxx` sets `UCX_RNDV_THRESH=8192` for the process and its children: that is taken back.
- An endpoint over TCP waits, and with it the process, until the peer's host answers, unless `TCP_CONN_NB=y`: for two
  minutes where its answers are lost on their way.
- The descriptor of a worker stays readable while a TCP peer has not accepted yet: sleeping on it would be a spin.
- A request does not keep its buffer alive, and an endpoint that failed must not be closed again (it would crash).
"""

from __future__ import annotations

import atexit
import importlib
import os
import select
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from stagemesh.errors import TransportError

from .base import FENCES, Buffer, cuda_bytes, host_view, is_cuda, tensor_array
from .frame import cancelled
from .ucx_ear import Ear
from .ucx_peer import Endpoint, ProcessIdentity, UcxPeer, endpoint_route, pack_address, unpack_address

DEFAULTS = {"MM_ERROR_HANDLING": "y", "KEEPALIVE_INTERVAL": "1s", "TCP_CONN_NB": "y"}

HOST_DEFAULTS = {**DEFAULTS, "RNDV_THRESH": "262144"}
"""Below 256 KiB a host message goes eagerly: it needs no progress of a sender that is deep in compute."""

CUDA_DEFAULTS = {**DEFAULTS, "RNDV_THRESH": "8192"}
"""CUDA memory goes by rendezvous, so that cuda_ipc moves it without a bounce through host memory."""

_WATCH_EVERY = 64
_MAX_SPINS = 64
_IDLE_ARMS = 16
_UNREADY_SLEEP_S = 0.001
FULL_MASK = (1 << 64) - 1


def load_ucxx() -> Any:
    """ucxx's extension module.

    Raises:
        TransportError: ucxx is not installed, or cannot be loaded; the cause says why.
    """
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # read once, at load
    asked = os.environ.get("UCX_RNDV_THRESH")
    try:
        return importlib.import_module("ucxx._lib.libucxx")
    except ImportError as error:
        raise TransportError(f"ucxx is not installed (pip install 'stagemesh[ucx-cu12]'): {error}") from error
    finally:
        if asked is None:  # ucxx sets its own, for this process and its children
            os.environ.pop("UCX_RNDV_THRESH", None)


_open: WeakSet[UcxTransport] = WeakSet()


@atexit.register
def _close_all() -> None:
    """A process that ends on an error ends, too: see `UcxTransport.__del__`."""
    for transport in list(_open):
        transport.close()


class UcxRequest:
    """See `Request`. Keeps the buffer until UCX is done with it."""

    __slots__ = ("_buffer", "_cancelled", "_done", "_error", "_raw", "_transport", "nbytes", "stray", "tag")

    def __init__(self, transport: UcxTransport, raw: Any, buffer: Any, nbytes: int, tag: int | None) -> None:
        self._transport, self._raw, self._buffer = transport, raw, buffer
        self.nbytes = nbytes
        self.tag = tag  # of a receive
        self.stray = False  # the message that should cancel it is still about
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
            self._cancelled = self.stray = True
            self._transport.send_stray(self)

    def _finish(self) -> None:
        try:
            self._raw.check_error()
        except self._transport.lib.UCXError as error:
            self.stray = False
            if self._cancelled:
                self._error = cancelled()
            elif "Truncated" in type(error).__name__:
                self._error = TransportError(f"a message was longer than its buffer of {self.nbytes} bytes")
            else:
                self._error = TransportError(f"UCX: {error}")
            self._error.__cause__ = error
        if self.stray and not self._transport.find_stray(self):
            return  # the real message was first; the other one must not meet a later receive
        self._done = True
        self._buffer = None
        self._transport.forget(self)


class UcxTransport:
    """See `Transport`. `options` are UCX's own, without the `UCX_` prefix: `{"TLS": "tcp", "NET_DEVICES": "eth0"}`.

    They win over `UCX_*` in the environment, which win over the defaults above.

    Raises:
        TransportError: ucxx is missing, or UCX cannot be initialised with these options.
    """

    name = "ucx"

    def __init__(self, options: Mapping[str, str] | None = None, *, device: str = "cpu") -> None:
        self.lib = load_ucxx()
        self._array = importlib.import_module("ucxx._lib.arr").Array
        defaults = CUDA_DEFAULTS if device.startswith("cuda") else HOST_DEFAULTS
        config = {key: value for key, value in defaults.items() if f"UCX_{key}" not in os.environ}
        config.update(options or {})
        feature = self.lib.Feature
        try:
            self._context = self.lib.UCXContext(config_dict=config, feature_flags=(feature.TAG, feature.WAKEUP))
            self._worker = self.lib.UCXWorker(self._context)
            self._worker.init_blocking_progress_mode()
        except self.lib.UCXError as error:
            raise TransportError(f"UCX cannot be initialised with {config}: {error}") from error
        self._tag, self._mask = self.lib.UCXXTag, self.lib.UCXXTagMask
        self._ucx_address = self.lib.UCXAddress.create_from_worker(self._worker).tobytes()
        self._config = config
        self._ear: Ear | None = None
        self._identity = ProcessIdentity.own()
        self._live: dict[int, UcxRequest] = {}
        self._endpoints: dict[bytes, Endpoint] = {}
        self._self_peer: Any = None
        self._fences: list[tuple[int, int]] = []
        self._strays: dict[int, UcxRequest] = {}  # by the tag of the cancelled receive
        self._deaths = select.epoll()
        self._events = select.poll()
        self._events.register(self._worker.epoll_file_descriptor, select.POLLIN)
        self._idle_arms = 0  # since something last happened
        self._calls = 0
        self.late_count = 0
        self._closed = False
        _open.add(self)

    def __del__(self) -> None:
        # The destructors behind these objects wait for peers when they run in the wrong order: for ever, maybe.
        if not getattr(self, "_closed", True):
            self.close()

    def address(self) -> bytes:
        return pack_address(self._identity, self._ucx_address)

    def connect(self, address: bytes, *, timeout_s: float = 5.0) -> UcxPeer:
        identity, ucx_address = unpack_address(address)
        for key, endpoint in list(self._endpoints.items()):
            if not endpoint.alive:
                endpoint.close()
                del self._endpoints[key]
        if ucx_address not in self._endpoints:
            self._endpoints[ucx_address] = self._new_endpoint(identity, ucx_address)
        return UcxPeer(self, self._endpoints[ucx_address])

    def _new_endpoint(self, identity: ProcessIdentity, ucx_address: bytes) -> Endpoint:
        try:
            pidfd = identity.watch(self._identity)
        except TransportError:
            self.doubt()
            raise
        try:
            raw = self._endpoint(ucx_address)
        except TransportError:
            if pidfd is not None:
                os.close(pidfd)
            raise
        if pidfd is not None:
            self._deaths.register(pidfd, select.EPOLLIN)
        return Endpoint(self, raw, pidfd, kept=pidfd is not None and identity.shares_network)

    def recv(self, tag: int, buffer: Buffer) -> UcxRequest:
        array, nbytes = self.array(buffer, writable=True)
        return self.track(self._worker.tag_recv(array, self._tag(tag)), (array, buffer), nbytes, tag)

    def probe(self, tag: int) -> bool:
        return bool(self._worker.tag_probe(self._tag(tag)).matched)

    def discard(self, tag: int, mask: int, *, forever: bool = False) -> int:
        if forever:
            self._fences = [*self._fences[1 - FENCES :], (tag, mask)]
        dropped = 0
        while (found := self._worker.tag_probe(self._tag(tag & mask), self._mask(mask), True)).matched:
            self._drop(found)
            cancelling = self._strays.get(found.sender_tag)
            if cancelling is not None and found.length == cancelling.nbytes + 1:
                cancelling.stray = False
                del self._strays[found.sender_tag]
            else:
                dropped += 1
        return dropped

    def progress(self) -> bool:
        spins = 0
        while spins < _MAX_SPINS and self._worker.progress_once():
            spins += 1
        if spins:
            self._idle_arms = 0
        if self._ear is not None:
            self._ear.progress()
        self._calls += 1
        if self._calls % _WATCH_EVERY == 0:
            self._sweep()
            return self._watch() or spins > 0
        return spins > 0

    def fds(self) -> list[tuple[int, int]]:
        return [(self._worker.epoll_file_descriptor, select.POLLIN), (self._deaths.fileno(), select.POLLIN)]

    def arm(self) -> bool:
        if self._watch() or not self._worker.arm():
            return False
        self._idle_arms += 1
        if self._idle_arms > _IDLE_ARMS and self._events.poll(0):
            self._deaths.poll(_UNREADY_SLEEP_S)  # as long as a TCP peer has not accepted, the descriptor stays readable
        return True

    def doubt(self) -> None:
        if self._closed:
            return
        if self._ear is None:
            self._ear = Ear(self, self._ucx_address, self._config, self._context.info)
        self._ear.ask()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        if self._ear is not None:
            self._ear.close()
            self._ear = None
        for endpoint in self._endpoints.values():
            endpoint.close()
        for _ in range(_WATCH_EVERY):
            self.progress()
        self.discard(0, 0)  # ucxx would fetch what nobody took, and wait for senders that are gone
        if self._self_peer is not None and self._self_peer.alive:
            self._self_peer.close_blocking()
        self._worker.cancel_inflight_requests()
        for _ in range(_WATCH_EVERY):
            if not self._live:
                break
            self.progress()
            self._sweep()
        self._deaths.close()
        self._endpoints.clear()
        self._self_peer = None
        del self._worker, self._context

    def track(self, raw: Any, buffer: Any, nbytes: int, tag: int | None) -> UcxRequest:
        """Hold request and buffer until UCX has completed it, whatever the caller does with the request."""
        request = UcxRequest(self, raw, buffer, nbytes, tag)
        if not request.done:
            self._live[id(request)] = request
        return request

    def forget(self, request: UcxRequest) -> None:
        """A request is done."""
        self._live.pop(id(request), None)
        if request.tag is not None and self._strays.get(request.tag) is request:
            del self._strays[request.tag]

    def array(self, buffer: Buffer, *, writable: bool) -> tuple[Any, int]:
        """ucxx's view of a contiguous buffer, and its size in bytes."""
        if is_cuda(buffer):
            array = self._array(cuda_bytes(buffer))
            return array, int(array.nbytes)
        if isinstance(buffer, bytes | bytearray | memoryview):
            view = host_view(buffer)
            if view.readonly:
                if writable:
                    raise TransportError("a receive needs a writable buffer, got a read-only one")
                view = memoryview(bytearray(view))
            return self._array(view), view.nbytes
        array = self._array(tensor_array(buffer))
        return array, int(array.nbytes)

    def send_stray(self, request: UcxRequest) -> None:
        """A message to this transport itself that ends a receive which waits for its tag."""
        assert request.tag is not None
        if self._self_peer is None:
            self._self_peer = self._endpoint(self._ucx_address)
        self._strays[request.tag] = request
        payload = bytearray(request.nbytes + 1)
        array = self._array(payload)
        self.track(self._self_peer.tag_send(array, self._tag(request.tag)), (array, payload), len(payload), None)

    def find_stray(self, request: UcxRequest) -> bool:
        """Drop the message of `send_stray` if it has come."""
        assert request.tag is not None
        self.discard(request.tag, FULL_MASK)
        return not request.stray

    def _drop(self, found: Any) -> None:
        """Take a probed message off the queue. One byte is enough: UCX drops what does not fit, and does not fetch a
        rendezvous for it."""
        scratch = bytearray(1)
        array = self._array(scratch)
        self.track(self._worker.tag_recv_with_handle(array, found), (array, scratch), 1, None)

    def route_of(self, endpoint: Any) -> str:
        """See `Peer.route`."""
        return endpoint_route(endpoint.handle)

    def unwatch(self, pidfd: int) -> None:
        """Nobody cares for a process any more."""
        if not self._deaths.closed:
            self._deaths.unregister(pidfd)

    def tag(self, tag: int) -> Any:
        """ucxx's tag object."""
        return self._tag(tag)

    def _endpoint(self, ucx_address: bytes) -> Any:
        try:
            address = self.lib.UCXAddress.create_from_buffer(bytearray(ucx_address))
            return self.lib.UCXEndpoint.create_from_worker_address(self._worker, address, True)
        except self.lib.UCXError as error:
            raise TransportError(f"UCX cannot reach the peer: {error}") from error

    def _watch(self) -> bool:
        """Look whether a watched process has ended, and drop the frames of dead lanes."""
        for value, mask in self._fences:
            self.late_count += self.discard(value, mask)
        ended = {fd for fd, _ in self._deaths.poll(0)} if not self._deaths.closed else set()
        for endpoint in list(self._endpoints.values()) if ended else ():
            if endpoint.pidfd in ended:
                endpoint.died()
        return bool(ended)

    def _sweep(self) -> None:
        """Let go of requests that are complete though nobody asked."""
        for request in list(self._live.values()):
            _ = request.done
