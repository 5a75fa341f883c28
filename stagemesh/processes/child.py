"""A handle of a child process, spawned or forked. It holds a pidfd, so that it never signals another process."""

from __future__ import annotations

import contextlib
import os
import select
import signal

UNKNOWN = 255
"""Exit status of a child that other code has reaped. asyncio uses the same number."""


class ChildProcess:
    """A child of this process. `poll` and `wait` reap it when it has ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """The exit status, or the negative number of the signal that ended it; None while it runs."""
        self._pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """Returns `returncode`, or None while it runs."""
        if self.returncode is None:
            try:
                ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                self.returncode = UNKNOWN
            else:
                if ended is not None:
                    exited = ended.si_code == os.CLD_EXITED
                    self.returncode = ended.si_status if exited else -ended.si_status
            if self.returncode is not None:
                os.close(self._pidfd)
        return self.returncode

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Waits for its end, at most `timeout_s`. Returns `returncode`."""
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            poll.poll(None if timeout_s is None else timeout_s * 1000)
        return self.poll()

    def send_signal(self, sig: signal.Signals) -> None:
        """Sends a signal if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, sig)

    def kill(self) -> None:
        """Sends SIGKILL. The caller must still wait for the child."""
        self.send_signal(signal.SIGKILL)

    def kill_group(self) -> None:
        """Sends SIGKILL to its process group, which it must lead."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def how_it_ended(status: int | None) -> str:
    """Describes an exit status in words."""
    if status is not None and status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"
