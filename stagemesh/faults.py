"""Fault injection: named points in the code at which tests kill or stop a process.

A test sets STAGEMESH_FAULT_DIR to a folder and creates a file there with a point's name. The first process that reaches
that point removes the file and kills itself, as `kill -9` would. A file that holds the name of another signal, such as
SIGSTOP, makes the process send itself that signal. Without the variable a point costs one comparison.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

FOLDER = os.environ.get("STAGEMESH_FAULT_DIR")

POINTS = (
    "coordinator.before_epoch_write",
    "coordinator.after_epoch_write",
    "coordinator.before_plan_write",
    "coordinator.after_plan_write",
    "coordinator.before_order_write",
    "coordinator.within_order_write",
    "coordinator.after_order_write",
    "coordinator.before_slot_write",
    "coordinator.after_slot_write",
    "coordinator.moved",
    "agent.assign",
    "agent.prepare",
    "agent.open_session",
    "agent.release",
    "rank.assign",
    "rank.offer_link",
    "rank.connect_link",
    "rank.activate",
    "rank.open_session",
    "rank.plan",
    "rank.before_compute",
    "rank.before_send",
    "rank.after_send",
    "rank.after_release",
    "rank.before_report",
    "rank.before_journal",
    "rank.replay",
    "rank.copy_send",
    "rank.copy_land",
    "gateway.after_plan",
    "gateway.before_open",
    "gateway.before_promise",
    "gateway.before_log",
    "gateway.after_log",
    "gateway.before_switch",
    "gateway.after_switch",
)
"""All points. Tests go through the list."""


def point(name: str) -> None:
    """Marks a point."""
    if FOLDER is not None:
        _reach(FOLDER, name)


def poison(tokens: Iterable[int]) -> None:
    """A place where a rank dies each time that it is to compute the token that the file `rank.poison` names."""
    if FOLDER is not None:
        path = Path(FOLDER, "rank.poison")
        if path.exists() and int(path.read_text()) in tokens:
            os.kill(os.getpid(), signal.SIGKILL)


def _reach(folder: str, name: str) -> None:
    assert name in POINTS, name
    path = Path(folder, name)
    try:
        wanted = path.read_text()
        path.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.Signals[wanted or "SIGKILL"])
