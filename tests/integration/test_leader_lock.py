"""Two coordinators on one state: one is the leader, the other takes over when that is gone."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import free_port, wait_for

from stagemesh.settings.model import DEMO_MODEL


@contextlib.contextmanager
def coordinator(state: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "stagemesh.cli.main", "coordinator", "--model", str(DEMO_MODEL), "-pp", "2",
               "--port", str(port), "--state-dir", str(state)]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_second_waits_and_takes_over(tmp_path: Path, how: signal.Signals) -> None:
    port, first_log, second_log = free_port(), tmp_path / "first", tmp_path / "second"
    with coordinator(tmp_path / "state", port, first_log) as first:
        wait_for(first_log, "coordinator listens")
        with coordinator(tmp_path / "state", port, second_log) as second:
            wait_for(second_log, "this one waits until it is gone")
            assert "listens" not in second_log.read_text()
            first.send_signal(how)
            first.wait(10)
            wait_for(second_log, "coordinator listens", timeout_s=5)
            assert second.poll() is None


def test_one_that_waits_ends_when_it_is_told_to(tmp_path: Path) -> None:
    port, first_log, second_log = free_port(), tmp_path / "first", tmp_path / "second"
    with coordinator(tmp_path / "state", port, first_log):
        wait_for(first_log, "coordinator listens")
        with coordinator(tmp_path / "state", port, second_log) as second:
            wait_for(second_log, "this one waits until it is gone")
            second.send_signal(signal.SIGTERM)
            assert second.wait(5) == 0
