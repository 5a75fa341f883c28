"""Two transports in one process, and links between them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable

import pytest
import torch
from inproc import open_any

from stagemesh.stage_worker.links.link import LinkIdentity, LinkReceiver, LinkSender
from stagemesh.transport import Transport

needs_ucxx = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed: UCX is NOT tested"
)
HIDDEN = 64
DTYPE = torch.bfloat16


def identity(**changes: object) -> LinkIdentity:
    made = LinkIdentity(
        nonce=int.from_bytes(os.urandom(4)),
        epoch=3,
        secret=os.urandom(16),
        hidden_size=HIDDEN,
        dtype=DTYPE,
        credits=2,
        max_rows=100,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


class Bench:
    """A sending and a receiving transport, and the links between them."""

    def __init__(self, name: str) -> None:
        self.left: Transport = open_any(name)
        self.right: Transport = open_any(name)
        self.links: list[LinkSender | LinkReceiver] = []

    def link(self, ours: LinkIdentity, theirs: LinkIdentity | None = None) -> tuple[LinkSender, LinkReceiver]:
        receiver = LinkReceiver(self.right, self.left.address(), ours)
        sender = LinkSender(self.left, self.right.address(), theirs or ours)
        self.links += [receiver, sender]
        return sender, receiver

    def joined(self, credits: int = 2, max_rows: int = 100) -> tuple[LinkSender, LinkReceiver]:
        sender, receiver = self.link(identity(credits=credits, max_rows=max_rows))
        self.drive(lambda: sender.up and receiver.up)
        receiver.open_lane(0)
        sender.open_lane(0)
        return sender, receiver

    def turn(self) -> None:
        self.left.progress()
        self.right.progress()
        for link in self.links:
            link.progress()

    def drive(self, until: Callable[[], bool], timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not until():
            self.turn()
            assert time.monotonic() < deadline, f"nothing came within the deadline; {[x.error for x in self.links]}"

    def take(self, receiver: LinkReceiver, slot: int, step: int) -> torch.Tensor:
        """Wait for a step, copy it, give its buffer back."""
        self.drive(lambda: receiver.ready(slot, step) is not None)
        tensor = receiver.ready(slot, step)
        assert tensor is not None
        copy = tensor.clone()
        receiver.release(slot, step)
        return copy

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.drive(lambda: all(link.drained for link in self.links))
        self.left.close()
        self.right.close()
