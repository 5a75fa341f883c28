"""What the activation plane asks of a transport: tagged messages between processes, driven by the caller.

There is no thread and no event loop in here. The owner of a transport calls `progress()` in its own loop (and between
layers, while it computes), and sleeps on `fds()` after `arm()` said that nothing is pending. Every request keeps its
buffer alive, and is `done` only when nothing will read or write that buffer any more.

Three transports keep this contract, and one set of checks runs on all of them: `ucx`, `tcp`, `inproc`.
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
        """True when the buffer is no longer read or written, whether that went well (`error is None`) or not."""

    @property
    def error(self) -> TransportError | None:
        """Why it failed; None while under way, and after success."""

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes."""

    def cancel(self) -> None:
        """Ask for an early end. Best effort: the message may still land. Wait for `done` before using the buffer."""


class Peer(Protocol):
    """A directed way to one remote transport. The other direction is a `Peer` of the other side."""

    def send(self, tag: int, buffer: Buffer) -> Request:
        """Start to send a contiguous buffer under a 64-bit tag. Messages of one peer arrive in order.

        Raises:
            TransportError: the peer is known to be gone, or closed.
        """

    @property
    def route(self) -> str:
        """The way that bytes really take, as the transport itself reports it: "shared memory", "tcp", "rc",
        "cuda_ipc", "in-process", joined by "+" where there are several; may be "unknown" before the first message."""

    @property
    def error(self) -> TransportError | None:
        """Set once the remote side is known to be gone. A process that is stopped but not dead stays unnoticed:
        deadlines are the caller's."""

    def close(self) -> None:
        """Give the way up, without waiting. What was not yet delivered may be lost; its requests end, some only when
        the other side discards their messages, goes on, or dies."""


class Transport(Protocol):
    """Tagged messages in and out of this process, on the caller's thread."""

    @property
    def name(self) -> str:
        """ "ucx", "tcp" or "inproc"."""

    def address(self) -> bytes:
        """What a remote side needs to `connect`: carried by gRPC, opaque, a secret on TCP."""

    def connect(self, address: bytes, *, timeout_s: float | None = None) -> Peer:
        """A way to the transport with that address. Returns at once: a failure to reach it shows as `Peer.error`
        after at most `timeout_s` seconds of `progress()` where the transport can tell; default: the transport's.

        Raises:
            TransportError: the address is not one of this transport, or damaged.
        """

    def recv(self, tag: int, buffer: Buffer) -> Request:
        """Post a receive for the next message with exactly this tag, from any peer. The message should have exactly the
        size of the buffer: a longer one is an error of the request and never written past the buffer; a shorter one is
        an error too on TCP and in process, but UCX cannot tell. Sizes are agreed on before, by the plan."""

    def probe(self, tag: int) -> bool:
        """True when a message with this tag is here, or has begun to come, and no receive is posted for it."""

    def discard(self, tag: int, mask: int, *, forever: bool = False) -> int:
        """Drop the unexpected messages whose tag equals `tag` in the bits of `mask`; returns how many. `forever` also
        drops those that come later (for the latest `FENCES` such calls)."""

    @property
    def late_count(self) -> int:
        """Messages that came behind a `discard(forever=True)` that names them, and were dropped."""

    def progress(self) -> bool:
        """Move what can be moved without waiting; True when something happened. About a microsecond when idle.

        Raises:
            TransportError: this end can be reached no longer: see `doubt`. Its process had better end.
        """

    def doubt(self) -> None:
        """A peer that should have been heard was not: find out whether it is this end that hears nothing. Cheap but
        for the first time on UCX, which takes milliseconds."""

    def fds(self) -> list[tuple[int, int]]:
        """(file descriptor, poll events) to sleep on. The list stays the same for the life of the transport."""

    def arm(self) -> bool:
        """Call before sleeping on `fds()`. False: something is pending, call `progress()` again first."""

    def close(self) -> None:
        """Close all peers and free what the transport holds, within a fraction of a second."""


FENCES = 64
"""How many `discard(forever=True)` a transport remembers."""


def is_cuda(buffer: Buffer) -> bool:
    """True for a tensor in CUDA memory."""
    return bool(getattr(buffer, "is_cuda", False))


def send_view(buffer: Buffer) -> memoryview:
    """The bytes of a contiguous buffer, to be read: without a copy for host memory, staged through pinned host memory
    for CUDA memory."""
    if is_cuda(buffer):
        return _tensor_bytes(_pinned_like(buffer).copy_(cast("torch.Tensor", buffer)))
    return host_view(buffer)


def recv_view(buffer: Buffer) -> tuple[memoryview, Callable[[], None] | None]:
    """The bytes of a contiguous buffer, to be written, and what to call when they are all there (CUDA: the copy up)."""
    if is_cuda(buffer):
        tensor = cast("torch.Tensor", buffer)
        staged = _pinned_like(tensor)

        def land() -> None:
            tensor.copy_(staged)

        return _tensor_bytes(staged), land
    view = host_view(buffer)
    if view.readonly:
        raise TransportError("a receive needs a writable buffer, got a read-only one")
    return view, None


def host_view(buffer: Buffer) -> memoryview:
    """The bytes of a contiguous buffer in host memory, without a copy."""
    if isinstance(buffer, bytes | bytearray | memoryview):
        return memoryview(buffer).cast("B")
    return _tensor_bytes(buffer)


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor_array(tensor))


def tensor_array(tensor: torch.Tensor) -> Any:
    """A flat uint8 numpy view of a contiguous host tensor (bf16 has no buffer of its own)."""
    import torch

    if not tensor.is_contiguous():
        raise TransportError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.view(-1).view(torch.uint8).numpy()


def cuda_bytes(buffer: Buffer) -> torch.Tensor:
    """A flat uint8 view of a contiguous CUDA tensor (bf16 has no `__cuda_array_interface__` of its own), after the
    current stream has finished: a transport knows nothing of streams, and neither reads nor writes what a kernel still
    works on."""
    import torch

    tensor = cast("torch.Tensor", buffer)
    if not tensor.is_contiguous():
        raise TransportError(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous")
    torch.cuda.current_stream(tensor.device).synchronize()
    return tensor.detach().view(-1).view(torch.uint8)


def _pinned_like(buffer: Buffer) -> torch.Tensor:
    import torch

    tensor = cast("torch.Tensor", buffer)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
