"""A process that makes and closes ends of links as it is told: JSON lines over stdin, an answer to each on stdout.

    python relink_child.py    -> {"address": ...}    <- {"peer": address}    then {"do": ..., "link": ...} each

`offer` and `connect` (with `nonce` and `secret`) make an end, `frames` sends or expects some, `close` ends it, `state`
asks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch

from stagemesh.stage_worker.links.link import LinkIdentity, LinkReceiver, LinkSender
from stagemesh.transport import Transport, open_transport

ROWS, HIDDEN = 1024, 512
FRAMES = 2
LIFE_S = 60.0


class Ends:
    """Ends of links of one process to one other, by number."""

    def __init__(self, transport: Transport, peer: bytes) -> None:
        self.transport, self.peer = transport, peer
        self.links: dict[int, LinkSender | LinkReceiver] = {}
        self.closed: list[LinkSender | LinkReceiver] = []

    def do(self, do: str, link: int, nonce: int = 0, secret: str = "") -> Any:
        """Carries out a command; what there is to answer."""
        if do in ("offer", "connect"):
            identity = LinkIdentity(nonce, 1, bytes.fromhex(secret), HIDDEN, torch.float32, FRAMES, ROWS)
            end = LinkReceiver if do == "offer" else LinkSender
            self.links[link] = end(self.transport, self.peer, identity)
        elif do == "frames":
            self._frames(self.links[link])
        elif do == "close":
            self.closed.append(self.links.pop(link))
            self.closed[-1].close()
        return self.links[link].state if do == "state" else None

    @staticmethod
    def _frames(end: LinkSender | LinkReceiver) -> None:
        """So large that they go by rendezvous: then each endpoint knows the other's."""
        if isinstance(end, LinkSender):
            end.open_lane(0)
            for step in range(FRAMES):
                end.send(0, step, torch.zeros(ROWS, HIDDEN))
        else:
            end.open_lane(0)
            for step in range(FRAMES):
                end.post(0, step, (ROWS, HIDDEN))

    def progress(self) -> None:
        """One turn of the loop."""
        self.transport.progress()
        for end in [*self.links.values(), *self.closed]:
            end.progress()
        self.closed = [end for end in self.closed if not end.drained]


def say(what: Any) -> None:
    """In one write: the other side does not wait for the end of a line."""
    os.write(sys.stdout.fileno(), json.dumps(what).encode() + b"\n")


def main() -> None:
    transport = open_transport("ucx")
    say({"address": transport.address().hex()})
    ends = Ends(transport, bytes.fromhex(json.loads(sys.stdin.buffer.readline())["peer"]))
    os.set_blocking(sys.stdin.fileno(), False)
    until = time.monotonic() + LIFE_S
    while time.monotonic() < until:
        ends.progress()
        line = sys.stdin.buffer.readline()
        if line:
            say(ends.do(**json.loads(line)))


if __name__ == "__main__":
    main()
