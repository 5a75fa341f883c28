"""Links between two processes that live are made and closed in any order of their ends, and none breaks another."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from relink_child import Ends

from stagemesh.errors import TransportError
from stagemesh.transport import open_transport

CHILD = Path(__file__).parents[1] / "relink_child.py"
HOLDS_S = 1.5
"""UCX asks once a second whether the endpoint at the other side is still there."""
DEADLINE_S = 20.0
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ucxx") is None, reason="ucxx is not installed: UCX is NOT tested"
)


class Pair:
    """This process (0) and a child (1)."""

    def __init__(self) -> None:
        self.child = subprocess.Popen(
            [sys.executable, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
        )
        self.transport = open_transport("ucx")

    def begin(self) -> None:
        """Tells each of the other."""
        self.address = bytes.fromhex(self._hear()["address"])
        self._tell(peer=self.transport.address().hex())
        assert self.child.stdout is not None
        os.set_blocking(self.child.stdout.fileno(), False)
        self.ours = Ends(self.transport, self.address)

    def _tell(self, **what: object) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(what).encode() + b"\n")
        self.child.stdin.flush()

    def _hear(self) -> Any:
        assert self.child.stdout is not None
        deadline = time.monotonic() + DEADLINE_S
        while not (line := self.child.stdout.readline()):
            self.ours.progress()
            assert time.monotonic() < deadline, f"the child does not answer, and ended with {self.child.poll()}"
        return json.loads(line)

    def do(self, who: int, do: str, link: int, **more: object) -> Any:
        """A command for one of the two."""
        if who == 0:
            return self.ours.do(do, link, **more)
        self._tell(do=do, link=link, **more)
        return self._hear()

    def states(self, link: int) -> list[Any]:
        """Of both ends."""
        self.ours.progress()
        return [self.do(who, "state", link) for who in (0, 1)]

    def wait_ready(self, link: int) -> None:
        """Until both ends are."""
        deadline = time.monotonic() + DEADLINE_S
        while self.states(link) != ["ready", "ready"]:
            assert time.monotonic() < deadline, self.states(link)

    def make(self, link: int, sender: int) -> None:
        """A link over which frames go."""
        made = {"nonce": secrets.randbits(32), "secret": secrets.token_hex(16)}
        self.do(1 - sender, "offer", link, **made)
        self.do(sender, "connect", link, **made)
        self.wait_ready(link)
        for who in (1 - sender, sender):
            self.do(who, "frames", link)

    def end(self) -> None:
        """Leaves nothing."""
        self.child.kill()
        self.child.wait(10)
        for stream in (self.child.stdin, self.child.stdout):
            if stream is not None:
                stream.close()
        self.transport.close()


def watched() -> int:
    """Processes whose end this one waits for."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum("pidfd" in os.readlink(link) for link in links if link.is_symlink())


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    try:
        pair.begin()
        yield pair
    finally:
        pair.end()


ORDERS = [
    order
    for order in itertools.permutations(("offer", "connect", "close 0", "close 1"))
    if order.index("offer") < order.index("connect")
]


IN_CI = [("offer", "close 0", "close 1", "connect"), ("close 0", "offer", "connect", "close 1")]


@pytest.mark.parametrize(
    "order",
    [pytest.param(o, id=", ".join(o), marks=() if o in IN_CI else pytest.mark.slow) for o in ORDERS],
)
def test_the_last_link_closed_while_the_next_is_made(pair: Pair, order: tuple[str, ...]) -> None:
    """As when a stage changes hands: one pipeline lets go of a neighbour that another one takes at that moment."""
    for link in (0, 1):
        pair.make(link, sender=link)
    made = {"nonce": secrets.randbits(32), "secret": secrets.token_hex(16)}
    for step in order:
        what, _, who = step.partition(" ")
        if what == "close":
            for link in (0, 1):
                pair.do(int(who), "close", link)
        else:
            pair.do(0 if what == "offer" else 1, what, 2, **made)
    pair.wait_ready(2)
    for who in (0, 1):
        pair.do(who, "frames", 2)
    until = time.monotonic() + HOLDS_S
    while time.monotonic() < until:
        assert pair.states(2) == ["ready", "ready"]


def test_a_process_that_ends_while_no_link_goes_there_leaves_nothing(pair: Pair) -> None:
    before = watched()
    pair.make(0, sender=0)
    assert watched() == before + 1
    for who in (0, 1):
        pair.do(who, "close", 0)
    pair.child.kill()
    pair.child.wait(10)
    deadline = time.monotonic() + DEADLINE_S
    while watched() > before:
        pair.ours.progress()
        assert time.monotonic() < deadline, "a process that has ended is still watched"
    with pytest.raises(TransportError, match="has ended"):
        pair.transport.connect(pair.address)


def test_what_a_stopped_process_does_not_take_ends_with_it(pair: Pair) -> None:
    """Closing a link waits for nobody; a frame that is under way is kept until the other side goes on, or dies."""
    made = {"nonce": secrets.randbits(32), "secret": secrets.token_hex(16)}
    pair.do(1, "offer", 0, **made)
    pair.do(0, "connect", 0, **made)
    pair.wait_ready(0)
    pair.child.send_signal(signal.SIGSTOP)
    pair.do(0, "frames", 0)
    began = time.monotonic()
    pair.do(0, "close", 0)
    while time.monotonic() < began + 0.5:
        pair.ours.progress()
    assert pair.ours.closed, "the frame is under way"
    pair.child.kill()
    while pair.ours.closed:
        pair.ours.progress()
        assert time.monotonic() < began + DEADLINE_S, "a frame to a process that is gone holds its tensor"
