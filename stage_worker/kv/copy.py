"""Copies KV pages from the worker that holds a layer to the worker that will hold it.

The gateway tells both ends which pages to copy, and when. The sender reads them between two steps and sends them as one
frame. The receiver posts its receive in advance, as for a step. Pages that are written during the copy are sent again.
The link's credits pace the frames, and so does the gateway, which waits for the frames that are under way.

Shapes: N pages of a frame; for each layer K of all pages, then V; then the draft model's layers, if there is one.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait

import torch

from stagemesh.errors import InvalidRequest, TransportError
from stagemesh.faults import point

from ..links.link import LinkReceiver, LinkSender
from .landing import land
from .pool import KvPool

FRAME_BYTES = 1 << 20
"""Largest size of a frame, unless a single page is larger."""


class PageFrames:
    """Pages of some layers as frames: uint8 [N x page_bytes]."""

    def __init__(self, parts: Sequence[tuple[KvPool, Sequence[int]]]) -> None:
        """`parts`: pools, each with the layers to copy."""
        self._tensors = [
            _words(tensor.view(pool.num_pages, -1).view(torch.uint8))
            for pool, layers in parts
            for layer in layers
            for tensor in (pool.k(layer), pool.v(layer))
            if tensor.numel()  # There are no values if keys serve as such.
        ]
        self.device = parts[0][0].device
        self.num_pages = parts[0][0].num_pages
        self.page_bytes = sum(tensor[0].nbytes for tensor in self._tensors)

    @property
    def most_pages(self) -> int:
        """Largest number of pages in one frame."""
        return max(1, FRAME_BYTES // self.page_bytes)

    def read(self, pages: Sequence[int]) -> torch.Tensor:
        """Returns the content of `pages` as a frame."""
        index, at = self._index(pages), 0
        frame = torch.empty(len(pages) * self.page_bytes, dtype=torch.uint8, device=self.device)
        for tensor in self._tensors:
            size = len(pages) * tensor[0].nbytes
            part = frame[at : at + size].view(tensor.dtype).view(len(pages), -1)
            torch.index_select(tensor, 0, index, out=part)
            at += size
        return frame

    def write(self, pages: Sequence[int], frame: torch.Tensor) -> None:
        """Writes a frame into `pages`."""
        index, at = self._index(pages), 0
        for tensor in self._tensors:
            size = len(pages) * tensor[0].nbytes
            tensor.index_copy_(0, index, frame[at : at + size].view(tensor.dtype).view(len(pages), -1))
            at += size

    def _index(self, pages: Sequence[int]) -> torch.Tensor:
        return torch.tensor(pages, dtype=torch.int64, device=self.device)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Views bytes [P, N] as 8-byte words if N is a multiple of 8: torch copies single bytes seven times slower."""
    return tensor.view(torch.int64) if tensor.shape[1] % 8 == 0 else tensor


class PageSender:
    """The sending end of a KvCopy on one rank."""

    def __init__(self, link: LinkSender, frames: PageFrames) -> None:
        self.link = link
        self._frames = frames
        self._waiting: dict[int, deque[tuple[int, list[int]]]] = {}
        """Slot -> frames of that gateway that wait for a credit."""

    def send(self, slot: int, number: int, pages: list[int]) -> None:
        """Sends the content of `pages` as soon as there is a credit. Sends nothing when the link is over.

        The receiving end reports the loss, and this end goes on serving.
        """
        with contextlib.suppress(TransportError):
            if slot not in self._waiting:
                self.link.open_lane(slot)
                self._waiting[slot] = deque()
            self._waiting[slot].append((number, pages))
            self.progress()

    def progress(self) -> None:
        """Drives the link. Sends the frames for which there are credits."""
        self.link.progress()
        with contextlib.suppress(TransportError):
            for slot, frames in self._waiting.items():
                while frames and self.link.up and self.link.can_send(slot):
                    number, pages = frames.popleft()
                    point("rank.copy_send")
                    self.link.send(slot, number, self._frames.read(pages))


class PageReceiver:
    """The receiving end of a KvCopy on one rank."""

    def __init__(self, link: LinkReceiver, frames: PageFrames) -> None:
        self.link = link
        self.frames = frames
        self._coming: dict[int, deque[tuple[int, list[int]]]] = {}
        """Slot -> announced frames (number and pages), in order."""
        self._landing: dict[int, Future[None]] = {}
        """Slot -> the write of its next frame, once that frame has arrived."""

    def expect(self, slot: int, number: int, pages: list[int]) -> None:
        """Announces a frame and posts its receive. Raises InvalidRequest for more pages than a frame may hold."""
        if not 0 < len(pages) <= self.frames.most_pages:
            raise InvalidRequest(f"{len(pages)} pages in a frame that holds 1 to {self.frames.most_pages}")
        self.link.post(slot, number, (len(pages) * self.frames.page_bytes,))
        self._coming.setdefault(slot, deque()).append((number, pages))

    def take(self, slot: int) -> int | None:
        """Returns the number of a session's next frame once it is written into its pages; None before."""
        coming = self._coming.get(slot)
        if not coming:
            return None
        number, pages = coming[0]
        landing = self._landing.get(slot)
        if landing is None:
            frame = self.link.ready(slot, number)
            if frame is not None:
                point("rank.copy_land")
                self._landing[slot] = land(lambda: self.frames.write(pages, frame))
            return None
        if not landing.done():
            return None
        landing.result()  # Raises the error of the write, if any. That ends the rank.
        del self._landing[slot]
        coming.popleft()
        self.link.release(slot, number)
        return number

    def close_lane(self, slot: int) -> None:
        """Ends a session's lane. When this returns, nothing is written into its pages any more."""
        self._coming.pop(slot, None)
        landing = self._landing.pop(slot, None)
        if landing is not None:
            wait([landing])
        self.link.close_lane(slot)
