"""The interface of a transport: tagged messages between processes, driven by the caller.

A transport has no thread and no event loop. Its owner calls `progress()` in its own loop, and between layers while it
computes. It sleeps on `fds()` after `arm()` has said that nothing is pending. A request keeps its buffer alive, and is
`done` only when nothing will read or write that buffer any more.

`ucx` and `tcp` implement the interface. One set of tests runs on both, and on an implementation within one process
(`tests/inproc.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from stagemesh.errors import TransportError

if TYPE_CHECKING:
    import torch

    Buffer: TypeAlias = torch.Tensor | bytes | bytearray | memoryview
else:
    Buffer: TypeAlias = Any


class Request(Protocol):
    """One send or receive under way."""

    @property
    def done(self) -> bool:
        """Whether the buffer is no longer read or written, after success (`error is None`) or after failure."""

    @property
    def error(self) -> TransportError | None:
        """The reason of a failure; None while the request is under way, and after success."""

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""

    def cancel(self) -> None:
        """Asks for an early end. The message may still arrive, so the buffer must not be used before `done`."""


class Peer(Protocol):
    """One direction of traffic to one remote transport. The other direction is a `Peer` of the other side."""

    def send(self, tag: int, buffer: Buffer) -> Request:
        """Starts to send a contiguous buffer under a 64-bit tag. Messages of one peer arrive in order.

        Raises:
            TransportError: the peer is known to be gone, or closed.
        """

    @property
    def route(self) -> str:
        """The real path of the bytes, as the transport reports it: "shared memory", "tcp", "rc", "cuda_ipc", or several
        joined by "+". It may be "unknown" before the first message."""

    @property
    def error(self) -> TransportError | None:
        """The error, once the remote side is known to be gone. A stopped process is not noticed, so the caller needs
        deadlines."""

    def close(self) -> None:
        """Closes without waiting. Undelivered messages may be lost. Their requests end, some only when the other side
        discards the messages or dies."""


class Transport(Protocol):
    """Sends and receives tagged messages for this process, on the caller's thread."""

    @property
    def name(self) -> str:
        """ "ucx" or "tcp"."""

    def address(self) -> bytes:
        """Returns the address that a remote side passes to `connect`. It is opaque and sent by gRPC. On TCP it holds a
        secret."""

    def connect(self, address: bytes, *, timeout_s: float | None = None) -> Peer:
        """Connects to the transport with that address. Returns at once. A failure to reach it shows as `Peer.error`, on
        TCP after at most `timeout_s` of `progress()`; default: `TransportTiming.connect_s`.

        Raises:
            TransportError: the address is not one of this transport, or damaged.
        """

    def recv(self, tag: int, buffer: Buffer) -> Request:
        """Posts a receive for the next message with exactly this tag, from any peer.

        The message must have the size of the buffer. A longer one is an error of the request, and nothing is written
        past the buffer. A shorter one is an error on TCP; UCX cannot detect it.
        """

    def probe(self, tag: int) -> bool:
        """Whether a message with this tag has arrived, or begun to arrive, and no receive is posted for it."""

    def discard(self, tag: int, mask: int, *, forever: bool = False) -> int:
        """Drops the unexpected messages whose tag equals `tag` in the bits of `mask`. Returns how many.

        With `forever`, later messages are dropped, too. A transport remembers the last `FENCES` such calls.
        """

    @property
    def late_count(self) -> int:
        """Number of messages that were dropped because of an earlier `discard(forever=True)`."""

    def progress(self) -> bool:
        """Does all work that needs no waiting. Returns whether anything happened. Takes a microsecond when idle.

        Raises:
            TransportError: no peer can reach this transport any more (see `doubt`). The process should end.
        """

    def doubt(self) -> None:
        """Checks whether this transport's own receive side is blocked. Call it if a peer is unexpectedly silent.

        The result shows in `progress`. The first call on UCX takes milliseconds. Others are cheap.
        """

    def fds(self) -> list[tuple[int, int]]:
        """Returns (file descriptor, poll events) to sleep on. The list stays the same for the transport's life."""

    def arm(self) -> bool:
        """Prepares for sleeping on `fds()`. Returns False if something is pending: call `progress()` again first."""

    def close(self) -> None:
        """Closes all peers and frees the transport's resources, within a fraction of a second."""


FENCES = 64
"""Number of `discard(forever=True)` calls that a transport remembers."""


def is_cuda(buffer: Buffer) -> bool:
    """Whether the buffer is a tensor in CUDA memory."""
    return bool(getattr(buffer, "is_cuda", False))


def send_view(buffer: Buffer) -> memoryview:
    """Returns the bytes of a contiguous buffer, for reading. CUDA memory is copied to pinned host memory."""
    if is_cuda(buffer):
        tensor = cast("torch.Tensor", buffer)
        return host_view(_pinned_like(tensor).copy_(tensor))
    return host_view(buffer)


def recv_view(buffer: Buffer) -> tuple[memoryview, Callable[[], object] | None]:
    """Returns the bytes of a contiguous buffer, for writing, and for CUDA memory a function that copies them there."""
    if is_cuda(buffer):
        tensor = cast("torch.Tensor", buffer)
        staged = _pinned_like(tensor)
        return host_view(staged), lambda: tensor.copy_(staged)
    view = host_view(buffer)
    if view.readonly:
        raise TransportError("a receive needs a writable buffer, got a read-only one")
    return view, None


def host_view(buffer: Buffer) -> memoryview:
    """Returns the bytes of a contiguous buffer in host memory, without a copy."""
    if isinstance(buffer, bytes | bytearray | memoryview):
        return memoryview(buffer).cast("B")
    array: Any = _flat(buffer).numpy()  # bf16 has no buffer protocol.
    return memoryview(array)


def cuda_bytes(buffer: Buffer) -> torch.Tensor:
    """Returns a flat uint8 view of a contiguous CUDA tensor (bf16 has no `__cuda_array_interface__`).

    It first waits for the current stream: a transport does not know streams, and must not use memory that a kernel
    still uses.
    """
    import torch

    tensor = _flat(cast("torch.Tensor", buffer))
    torch.cuda.current_stream(tensor.device).synchronize()
    return tensor


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    if not tensor.is_contiguous():
        raise TransportError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.view(-1).view(torch.uint8)


def _pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
