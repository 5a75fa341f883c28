"""`stagemesh serve` as it is typed into a terminal: its processes write there, and Ctrl-C ends them all."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

READY_S, STOPPED_S = 30.0, 10.0
FLAGS = ("-pp", "2", "--port", "0", "--grpc-port", "0")


class Terminal:
    """`serve` in the foreground of a terminal that stops whoever writes from behind (`stty tostop`)."""

    def __init__(self) -> None:
        self._master, terminal = pty.openpty()
        modes = termios.tcgetattr(terminal)
        modes[3] |= termios.TOSTOP
        termios.tcsetattr(terminal, termios.TCSANOW, modes)
        # It becomes the terminal's session, as a shell's `exec` would have it.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, "-m", "stagemesh.cli.main", "serve", *FLAGS],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "STAGEMESH_LOG_LEVEL": "INFO"},
        )
        os.close(terminal)
        self._said = b""
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # Nobody has the terminal any more.
            while got := os.read(self._master, 1 << 16):
                self._said += got

    @property
    def said(self) -> str:
        """What is on the screen so far."""
        return self._said.decode(errors="replace")

    def wait_for(self, text: str) -> None:
        """Until it is on the screen."""
        deadline = time.monotonic() + READY_S
        while text not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, f"{text!r} was never said:\n{self.said}"
            time.sleep(0.02)

    def type(self, keys: bytes) -> None:
        """As from a keyboard."""
        os.write(self._master, keys)

    def close(self) -> None:
        """Nothing of it is left."""
        self.process.kill()
        self.process.wait()
        self._reading.join(STOPPED_S)
        os.close(self._master)


@contextmanager
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    try:
        yield opened
    finally:
        opened.close()


def test_all_write_to_the_terminal_and_ctrl_c_ends_them() -> None:
    with terminal() as seen:
        for who in ("coordinator", "stage 0", "stage 1 rank 0", "gateway"):
            seen.wait_for(f" I {who} ")
        seen.wait_for("Try:")
        family = psutil.Process(seen.process.pid).children(recursive=True)
        assert not [p for p in family if p.status() == psutil.STATUS_STOPPED], seen.said
        assert seen.process.pid not in {os.getpgid(p.pid) for p in family}, "Ctrl-C is for `serve` alone"
        seen.type(b"\x03")
        assert seen.process.wait(STOPPED_S) == 0, seen.said
        _, alive = psutil.wait_procs(family, timeout=1.0)
        assert not alive, f"left behind: {alive}\n{seen.said}"
