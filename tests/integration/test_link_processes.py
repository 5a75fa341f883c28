"""Links between real processes: a peer that is killed, a sender that computes, the route that UCX really took."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stagemesh.stage_worker.links.link import LinkIdentity, LinkReceiver, LinkSender
from stagemesh.transport import Transport, open_transport

CHILD = Path(__file__).with_name("link_child.py")
TESTS = Path(__file__).parents[1]
HIDDEN, DTYPE, BIG_ROWS = 1024, torch.bfloat16, 4096
needs_ucxx = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed: UCX is NOT tested"
)
KINDS = [pytest.param("ucx", marks=needs_ucxx), pytest.param("ucx-tcp", marks=needs_ucxx), "tcp"]
UCX_OVER_TCP = {"TLS": "tcp", "NET_DEVICES": "lo"}


class Mesh:
    """This process's transport and one child with a link to it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name = kind.partition("-")[0]
        options = UCX_OVER_TCP if kind == "ucx-tcp" else None
        self.transport: Transport = open_transport(self.name, ucx_options=options)
        self.child: subprocess.Popen[str] | None = None
        self.link: LinkSender | LinkReceiver | None = None

    def start(self, role: str) -> LinkSender | LinkReceiver:
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        if self.kind == "ucx-tcp":
            environment |= {f"UCX_{key}": value for key, value in UCX_OVER_TCP.items()}
        self.child = subprocess.Popen(
            [sys.executable, str(CHILD), role, self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        address = bytes.fromhex(self.hear()["address"])
        identity = LinkIdentity(int.from_bytes(os.urandom(4)), 1, os.urandom(16), HIDDEN, DTYPE, 4, BIG_ROWS)
        self.tell(address=self.transport.address().hex(), nonce=identity.nonce, secret=identity.secret.hex())
        link: LinkSender | LinkReceiver
        if role == "receive":
            link = LinkSender(self.transport, address, identity, timeout_s=20)
            link.open_lane(0)
        else:
            link = LinkReceiver(self.transport, address, identity, timeout_s=20)
            link.open_lane(0)
        self.link = link
        self.drive(lambda: link.up, 20)
        self.hear()
        return link

    def hear(self) -> dict[str, Any]:
        assert self.child is not None
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        assert line, f"the child ended with {self.child.wait(10)}"
        heard: dict[str, Any] = json.loads(line)
        return heard

    def tell(self, **what: object) -> None:
        assert self.child is not None
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(what) + "\n")
        self.child.stdin.flush()

    def drive(self, until: Callable[[], bool], timeout_s: float) -> float:
        """Turn the loop; returns the seconds it took."""
        began = time.monotonic()
        while not until():
            self.transport.progress()
            if self.link is not None:
                self.link.progress()
            assert time.monotonic() - began < timeout_s, f"nothing within {timeout_s} s"
        return time.monotonic() - began

    def end(self) -> None:
        if self.child is not None:
            if self.child.poll() is None:
                self.child.kill()
            self.child.wait(10)
            for stream in (self.child.stdin, self.child.stdout):
                if stream is not None:
                    stream.close()
        link = self.link
        if link is not None:
            link.close()
            self.drive(lambda: link.drained, 5)
        self.transport.close()


@pytest.fixture(params=KINDS)
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    mesh = Mesh(request.param)
    yield mesh
    mesh.end()


def shared_memory_of(pid: int) -> set[str]:
    """What a process has left: System V segments that it made, and POSIX ones named by UCX."""
    segments = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return {row[1] for row in segments if int(row[4]) == pid} | ucx_files()


def ucx_files() -> set[str]:
    return {f for f in os.listdir("/dev/shm") if "ucx" in f.lower()}


def kill(mesh: Mesh) -> None:
    assert mesh.child is not None
    os.kill(mesh.child.pid, signal.SIGKILL)


def test_a_killed_sender_is_an_error_at_once(mesh: Mesh) -> None:
    link = mesh.start("send")
    assert isinstance(link, LinkReceiver)
    for step in range(4):
        link.post(0, step, (8, HIDDEN))
    mesh.drive(lambda: link.ready(0, 0) is not None, 5)
    kill(mesh)
    took = mesh.drive(lambda: link.error is not None, 1.0)
    print(f"{mesh.kind}: noticed after {took * 1e3:.1f} ms: {link.error}")
    mesh.drive(lambda: link.drained, 1.0)


@pytest.mark.parametrize("rows", [8, BIG_ROWS], ids=["small", "8 MiB"])
def test_a_killed_receiver_is_an_error_at_once_and_frees_the_tensors(mesh: Mesh, rows: int) -> None:
    """The large frames are not posted on the other side: a rendezvous is open when its partner dies."""
    link = mesh.start("receive")
    assert isinstance(link, LinkSender)
    for step in range(10, 14):
        link.send(0, step, torch.ones(rows, HIDDEN, dtype=DTYPE))
    mesh.drive(lambda: not link.can_send(0), 5)
    kill(mesh)
    mesh.drive(lambda: link.error is not None, 1.0)
    mesh.drive(lambda: link.drained, 1.0)
    began = time.monotonic()
    mesh.transport.close()
    assert time.monotonic() - began < 1.0


def test_a_killed_peer_wakes_a_sleeper(mesh: Mesh) -> None:
    """The engine sleeps on the transport's descriptors when its neighbour dies."""
    link = mesh.start("send")
    poller = select.poll()
    for fd, events in mesh.transport.fds():
        poller.register(fd, events)
    kill(mesh)
    began = time.monotonic()
    while link.error is None and time.monotonic() - began < 1.0:
        happened = mesh.transport.progress()
        link.progress()
        if not happened and link.error is None and mesh.transport.arm():
            poller.poll(1000)
    assert time.monotonic() - began < 0.5
    assert link.error is not None


def test_a_killed_peer_leaves_no_shared_memory(mesh: Mesh) -> None:
    before = ucx_files()  # of other processes of this host, which were killed before
    link = mesh.start("send")
    assert mesh.child is not None
    kill(mesh)
    mesh.drive(lambda: link.error is not None, 1.0)
    mesh.end()
    assert shared_memory_of(mesh.child.pid) <= before


def test_a_second_worker_takes_the_place_of_a_killed_one(mesh: Mesh) -> None:
    first = mesh.start("send")
    kill(mesh)
    mesh.drive(lambda: first.error is not None, 1.0)
    mesh.drive(lambda: first.drained, 1.0)
    assert mesh.child is not None
    mesh.child.wait(10)
    for stream in (mesh.child.stdin, mesh.child.stdout):
        if stream is not None:
            stream.close()
    mesh.link = None
    second = mesh.start("send")
    assert isinstance(second, LinkReceiver)
    second.post(0, 0, (8, HIDDEN))
    mesh.drive(lambda: second.ready(0, 0) is not None, 5)


def test_a_sender_deep_in_compute_still_delivers(mesh: Mesh) -> None:
    """8 MiB from a sender that computes without a pause but calls `progress()` every 5 ms."""
    link = mesh.start("busy")
    assert isinstance(link, LinkReceiver)
    link.post(0, 0, (BIG_ROWS, HIDDEN))
    took = mesh.drive(lambda: link.ready(0, 0) is not None, 3.0)
    tensor = link.ready(0, 0)
    assert tensor is not None
    assert torch.equal(tensor, torch.full((BIG_ROWS, HIDDEN), 7.0, dtype=DTYPE))
    print(f"{mesh.kind}: 8 MiB in {took * 1e3:.0f} ms")


def test_the_route_is_what_was_taken(mesh: Mesh) -> None:
    link = mesh.start("send")
    assert isinstance(link, LinkReceiver)
    link.post(0, 0, (8, HIDDEN))
    mesh.drive(lambda: link.ready(0, 0) is not None, 5)
    assert mesh.child is not None
    assert mesh.child.stdin is not None
    mesh.child.stdin.write("\n")
    mesh.child.stdin.flush()
    expected = {"ucx": "shared memory", "ucx-tcp": "tcp", "tcp": "tcp"}[mesh.kind]
    assert link.route == expected
    assert mesh.hear() == {"route": expected}
    assert mesh.child.wait(10) == 0


ENDS_BADLY = """
import sys
from inproc import open_any
left, right = (open_any(sys.argv[1]) for _ in range(2))
peer, buffer = left.connect(right.address()), bytearray(8 << 20)
request = peer.send(1, buffer)
for _ in range(1000):
    left.progress()
right.recv(2, buffer).cancel()
cycle = [left, right, peer, request]
cycle.append(cycle)
if sys.argv[2] == "garbage":
    import gc
    del left, right, peer, request, cycle
    gc.collect()
raise SystemExit(7)
"""


@pytest.mark.parametrize("name", [pytest.param("ucx", marks=needs_ucxx), "tcp", "inproc"])
@pytest.mark.parametrize("how", ["exit", "garbage"])
def test_a_process_that_forgets_to_close_still_ends(name: str, how: str) -> None:
    """With a large send open and a cancel on its way, at the end of the interpreter and by the garbage collector."""
    command, environment = [sys.executable, "-c", ENDS_BADLY, name, how], dict(os.environ, PYTHONPATH=str(TESTS))
    ended = subprocess.run(command, timeout=30, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (7, "")


LEAVES_FRAMES_BEHIND = """
import gc, os, sys, torch
from stagemesh.stage_worker.links.link import LinkIdentity, LinkReceiver, LinkSender
from stagemesh.transport import open_transport
left, right = open_transport("ucx"), open_transport("ucx")
identity = LinkIdentity(5, 1, os.urandom(16), 64, torch.bfloat16, 4, 100)
receiver, sender = LinkReceiver(right, left.address(), identity), LinkSender(left, right.address(), identity)
def turn():
    for each in (left, right, receiver, sender):
        each.progress()
while not sender.up:
    turn()
receiver.open_lane(0)
sender.open_lane(0)
receiver.post(0, 0, (100, 64))
for step in range(4):
    sender.send(0, step, torch.ones(100, 64, dtype=torch.bfloat16))
receiver.close()
while not receiver.drained:
    turn()
late = left.connect(right.address()).send(77, bytearray(8 << 20))
for _ in range(1000):
    turn()
if sys.argv[1] == "close":
    left.close()
    right.close()
if sys.argv[1] != "exit":
    del left, right, receiver, sender, late, turn
    gc.collect()
raise SystemExit(7)
"""


@needs_ucxx
@pytest.mark.parametrize("how", ["close", "garbage", "exit"])
def test_ending_does_not_wait_for_a_frame_whose_sender_is_gone(how: str) -> None:
    """ucxx fetches what nobody took when a worker is destroyed: a rendezvous would keep the process for ever."""
    command, environment = [sys.executable, "-c", LEAVES_FRAMES_BEHIND, how], dict(os.environ, UCX_RNDV_THRESH="8192")
    ended = subprocess.run(command, timeout=30, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stderr) == (7, "")
