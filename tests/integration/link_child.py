"""The other end of a link, in a process of its own. Talks JSON lines with the test over stdin and stdout.

    python link_child.py ROLE TRANSPORT    -> {"address": ...}    <- {"address": ..., "nonce": ..., "secret": ...}

Roles: `receive` posts steps 0..9 and takes none of them; `send` sends one small frame and stays; `busy` sends 8 MiB and
computes in slices of 5 ms with `progress()` between them; `echo` sends back every frame.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time

import torch

from stagemesh.stage_worker.links.link import LinkIdentity, LinkReceiver, LinkSender
from stagemesh.transport import open_transport

HIDDEN = 1024
DTYPE = torch.bfloat16
BIG_ROWS = 4096  # 8 MiB
LIFE_S = 60.0


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def compute(seconds: float) -> None:
    end = time.perf_counter() + seconds
    matrix = torch.ones(64, 64)
    while time.perf_counter() < end:
        matrix = (matrix @ matrix).clamp(max=1)


def main() -> None:
    role, name = sys.argv[1:3]
    torch.set_num_threads(1)
    transport = open_transport(name)
    say(address=transport.address().hex(), pid=os.getpid())
    told = json.loads(sys.stdin.readline())
    identity = LinkIdentity(told["nonce"], 1, bytes.fromhex(told["secret"]), HIDDEN, DTYPE, 4, BIG_ROWS)
    remote = bytes.fromhex(told["address"])
    link: LinkSender | LinkReceiver
    if role == "receive":
        link = LinkReceiver(transport, remote, identity)
        link.open_lane(0)
    else:
        link = LinkSender(transport, remote, identity)
        link.open_lane(0)
    until = time.monotonic() + LIFE_S
    while not link.up:
        transport.progress()
        link.progress()
        assert link.error is None, link.error
        assert time.monotonic() < until
    if isinstance(link, LinkReceiver):
        for step in range(4):
            link.post(0, step, (8, HIDDEN))
    elif role == "send":
        link.send(0, 0, torch.ones(8, HIDDEN, dtype=DTYPE))
    else:
        link.send(0, 0, torch.full((BIG_ROWS, HIDDEN), 7.0, dtype=DTYPE))
    say(up=True)
    poller = select.poll()
    for fd, events in transport.fds():
        poller.register(fd, events)
    poller.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
    while time.monotonic() < until:
        if role == "busy":
            compute(0.005)
        happened = transport.progress()
        link.progress()
        if role == "busy":
            if poller.poll(0) and select.select([sys.stdin], [], [], 0)[0]:
                break
        elif not happened and transport.arm() and any(fd == sys.stdin.fileno() for fd, _ in poller.poll(1000)):
            break
    say(route=link.route)
    link.close()
    transport.close()


if __name__ == "__main__":
    main()
